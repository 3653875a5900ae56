// The pipeline over time: a row a stage, a bar a round, coloured by its request; zoom, drag, and the chunk under the pointer.

import { css, h, hint, seconds, whole } from "./dom.js";

const ROW = 30, GAP = 5, TOP = 22, LEFT = 58;

export function colour(request, faint = false) {
  const hue = (215 + 137.508 * request) % 360;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  return `hsl(${hue} ${faint ? 30 : 62}% ${dark ? 62 : 55}%)`;
}

// When the last round ends, in seconds.
export const endOf = ({ finish_s: finish }) => finish.reduce((latest, row) => Math.max(latest, row.at(-1)), 0);

export function timeline(plan, times, caption, until = 0) {
  const { start_s: start, finish_s: finish } = times;
  const groups = start[0].length, stages = plan.parallel?.virtual_stages > 1 ? plan.parallel.pp_size : groups;
  const own = endOf(times), end = Math.max(own, until);
  // Where a group of layers stands: round and round, or up and down.
  const stageOf = (group) => (plan.parallel?.stage_order === "v" && Math.floor(group / stages) % 2 ? stages - 1 - (group % stages) : group % stages);
  const canvas = h("canvas", { tabindex: "0", role: "img", "aria-label": `${caption}: ${start.length} rounds on ${stages} stages, ${seconds(own)}. Arrow keys move, plus and minus zoom.` });
  const height = TOP + stages * (ROW + GAP) + 6;
  let from = 0, to = end;

  const width = () => canvas.clientWidth;
  const x = (time) => LEFT + ((time - from) / (to - from)) * (width() - LEFT - 4);
  const time = (px) => from + ((px - LEFT) / (width() - LEFT - 4)) * (to - from);

  function draw() {
    if (!width()) return;
    const scale = devicePixelRatio || 1;
    canvas.width = width() * scale; canvas.height = height * scale; canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    pen.font = "11px system-ui, sans-serif";
    const ink = css("--quiet"), line = css("--line"), idle = css("--code");
    const step = niceStep((to - from) / Math.max(2, Math.floor(width() / 110)));
    pen.fillStyle = ink; pen.strokeStyle = line;
    for (let mark = Math.ceil(from / step) * step; mark <= to + 1e-12; mark += step) {
      const at = x(mark);
      if (at > width() - 8) break;
      pen.beginPath(); pen.moveTo(at, TOP - 4); pen.lineTo(at, height); pen.stroke();
      pen.fillText(seconds(mark), at + 3, 12);
    }
    for (let stage = 0; stage < stages; stage++) {
      const y = TOP + stage * (ROW + GAP);
      pen.fillStyle = idle; pen.fillRect(LEFT, y, width() - LEFT - 4, ROW);
      pen.fillStyle = ink; pen.fillText(`stage ${stage}`, 2, y + ROW / 2 + 4);
    }
    for (let group = 0; group < groups; group++) {
      const y = TOP + stageOf(group) * (ROW + GAP);
      for (let round = 0; round < start.length; round++) {
        const left = Math.max(LEFT, x(start[round][group])), right = Math.min(width() - 4, x(finish[round][group]));
        if (right < LEFT || left > width() - 4) continue;
        const chunks = plan.rounds[round], total = chunks.reduce((sum, chunk) => sum + chunk.tokens, 0);
        let top = y;
        for (const chunk of chunks) {
          const tall = (ROW * chunk.tokens) / total;
          pen.fillStyle = colour(chunk.request);
          pen.fillRect(left, top, Math.max(0.6, right - left - (right - left > 3 ? 1 : 0)), tall);
          top += tall;
        }
        if (right - left > 46) {
          pen.fillStyle = "#fff"; pen.fillText(whole(total), left + 5, y + ROW / 2 + 4);
        }
      }
    }
  }

  function zoom(factor, around = (from + to) / 2) {
    const span = Math.min(end, Math.max(end / 2000, (to - from) * factor));
    from = Math.max(0, Math.min(end - span, around - ((around - from) / (to - from)) * span));
    to = from + span;
    draw();
  }
  function move(share) {
    const span = to - from;
    from = Math.max(0, Math.min(end - span, from + share * span)); to = from + span;
    draw();
  }

  function under(event) {
    const box = canvas.getBoundingClientRect(), at = time(event.clientX - box.left);
    const stage = Math.floor((event.clientY - box.top - TOP) / (ROW + GAP));
    if (stage < 0 || stage >= stages) return null;
    let low = 0, group = 0;
    for (group = 0; group < groups; group++) {
      if (stageOf(group) !== stage) continue;
      let high = start.length - 1;
      low = 0;
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (start[middle][group] <= at) low = middle; else high = middle - 1;
      }
      if (at >= start[low][group] && at <= finish[low][group]) break;
    }
    if (group === groups) return null;
    const shown = plan.rounds[low].map((chunk) =>
      `${plan.requests[chunk.request].id}: ${whole(chunk.tokens)} tokens after ${whole(chunk.start)}`);
    const more = shown.length > 6 ? [`and ${shown.length - 6} more`] : [];
    return [`round ${low} on stage ${stage}${groups > stages ? `, group ${group}` : ""}, ${seconds(finish[low][group] - start[low][group])}`, ...shown.slice(0, 6), ...more].join("\n");
  }

  let dragged = null;
  canvas.addEventListener("pointerdown", (event) => { dragged = { x: event.clientX, from }; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointerup", () => { dragged = null; });
  canvas.addEventListener("pointermove", (event) => {
    if (dragged && Math.abs(event.clientX - dragged.x) > 2) {
      const span = to - from;
      from = Math.max(0, Math.min(end - span, dragged.from - ((event.clientX - dragged.x) / (width() - LEFT)) * span));
      to = from + span;
      draw();
    }
    hint(event, dragged ? null : under(event));
  });
  canvas.addEventListener("pointerleave", (event) => hint(event, null));
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && Math.abs(event.deltaX) > Math.abs(event.deltaY)) { event.preventDefault(); move(event.deltaX / width()); return; }
    if (!event.ctrlKey && !event.shiftKey && document.activeElement !== canvas) return;
    event.preventDefault();
    zoom(Math.exp(event.deltaY / 300), time(event.clientX - canvas.getBoundingClientRect().left));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const action = { ArrowLeft: () => move(-0.2), ArrowRight: () => move(0.2), "+": () => zoom(0.6), "=": () => zoom(0.6), "-": () => zoom(1.7), 0: () => zoom(1e9) }[event.key];
    if (action) { event.preventDefault(); action(); }
  });
  new ResizeObserver(draw).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  const buttons = h("div", { class: "actions" },
    h("button", { type: "button", "aria-label": "Zoom in", onclick: () => zoom(0.5) }, "+"),
    h("button", { type: "button", "aria-label": "Zoom out", onclick: () => zoom(2) }, "−"),
    h("button", { type: "button", onclick: () => zoom(1e9) }, "All"));
  const shownRequests = plan.requests.slice(0, 10);
  return h("div", { class: "card timeline" },
    h("div", { class: "timeline-head" }, h("h2", {}, caption), buttons),
    canvas,
    h("p", { class: "legend" }, shownRequests.map((request, index) => h("span", {},
      h("i", { style: { background: colour(index) } }), `${request.id} ${whole(request.prompt_tokens)}`)),
      plan.requests.length > 10 && h("span", {}, `and ${plan.requests.length - 10} more`)),
    times.num_rounds > start.length && h("p", { class: "quiet" }, `The first ${whole(start.length)} of ${whole(times.num_rounds)} rounds.`));
}

function niceStep(rough) {
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough);
}
