// What was measured: rates, attention over (chunk, context), links by size, and how well the fits tell what they have not seen.

import { all, get, post } from "./api.js";
import { heatMap, scatter } from "./charts.js";
import { $, h, percent, show, table, when, whole } from "./dom.js";

let chosen = null;

export async function start() {
  const found = await get("/hardware");
  if (!found.length) { show($("hardware-list"), h("div", { class: "card" }, h("p", { class: "quiet" }, "Nothing was measured yet: start with a model under Jobs, or `isochunk db import`."))); return; }
  show($("hardware-list"), found.map((one) => h("button", { type: "button", class: "card", "aria-pressed": "false", "data-id": one.id, onclick: () => open(one) },
    h("h2", {}, `${one.hardware.device_count} × ${one.hardware.device}`),
    h("dl", {}, h("dt", {}, "link"), h("dd", {}, one.hardware.link), h("dt", {}, "memory"), h("dd", {}, `${(one.hardware.memory_bytes / 2 ** 30).toFixed(0)} GiB`),
      h("dt", {}, "driver"), h("dd", {}, one.hardware.driver), h("dt", {}, "torch"), h("dd", {}, one.hardware.torch_version),
      h("dt", {}, "measured"), h("dd", {}, `${whole(one.num_measurements)} points, last ${when(one.last_measured_at)}`)))));
  const best = found.reduce((a, b) => (b.num_measurements > a.num_measurements ? b : a));
  if (chosen === null || !found.some((one) => one.id === chosen)) await open(best);
}

async function open(one) {
  chosen = one.id;
  for (const card of document.querySelectorAll("#hardware-list button")) card.setAttribute("aria-pressed", String(card.dataset.id === String(one.id)));
  show($("hardware-detail"), h("p", { class: "quiet" }, "Reading what was measured …"));
  const [points, fits] = await Promise.all([all(`/measurements?hardware=${one.id}`), get(`/fits?hardware=${one.id}&limit=1`)]);
  if (chosen !== one.id) return;
  const rows = points.map((point) => point.measurement);
  const charts = [roofline(rows), attention(rows), links(rows)].filter(Boolean);
  const fit = fits.items[0], heldOut = fit?.report?.held_out ?? [];
  show($("hardware-detail"), h("div", { class: "results" }, h("div", { class: "split even" }, charts), missing(one, fit?.model_name), noise(rows), heldOut.length > 0 && h("div", { class: "card" },
    h("h2", {}, `Fit for ${fit.model_name} in ${fit.dtype}: errors on points it had not seen`),
    table([["what", (row) => row.op], ["points left out", (row) => row.num_points, true], ["median", (row) => percent(row.median), true], ["p90", (row) => percent(row.p90), true], ["worst", (row) => percent(row.worst), true]], heldOut))));
}

function missing(one, model) {
  const summary = h("div", {}), error = h("p", { class: "error", role: "alert" });
  const choice = h("select", { "aria-label": "Model", onchange: () => look() });
  async function look() {
    error.textContent = "";
    try {
      const rows = await get(`/hardware/${one.id}/coverage?model=${encodeURIComponent(choice.value)}`);
      const left = rows.reduce((sum, row) => sum + row.num_points - row.num_kept, 0), coarse = rows.reduce((sum, row) => sum + row.num_coarse_missing, 0);
      show(summary, h("p", { class: coarse ? "" : "quiet" }, coarse ? `${whole(coarse)} coarse points are missing: plans for it cannot be trusted yet.` : left ? `All coarse points are there; ${whole(left)} finer ones are not.` : "Everything is there."),
        table([["operation", (row) => row.op], ["kept", (row) => whole(row.num_kept), true], ["of", (row) => whole(row.num_points), true], ["coarse missing", (row) => whole(row.num_coarse_missing), true]], rows));
    } catch (problem) { error.textContent = problem.message; }
  }
  async function measure() {
    error.textContent = "";
    try {
      await post("/jobs", { kind: "profile", model: choice.value, hardware: `${one.hardware.device} x${one.hardware.device_count}`, options: {} });
      location.hash = "#jobs";
    } catch (problem) { error.textContent = problem.message; }
  }
  get("/models").then((models) => { show(choice, models.map((each) => h("option", { value: each.name, selected: each.name === model }, each.name))); look(); }).catch((problem) => { error.textContent = problem.message; });
  return h("div", { class: "card" }, h("h2", {}, "What is missing"), h("div", { class: "filters" }, choice, h("button", { type: "button", onclick: measure }, "Measure it")), summary, error);
}

function roofline(rows) {
  const products = rows.filter((row) => ["m", "n", "k"].every((name) => row.shape[name]) && row.group_size === 1);
  if (!products.length) return null;
  const width = { float32: 4 };
  const points = products.map(({ shape: { m, n, k }, dtype, median_us: us, busy_ranks: busy }) => {
    const flops = 2 * m * n * k, bytes = (width[dtype] ?? 2) * (m * k + k * n + m * n);
    return { x: flops / bytes, y: flops / us / 1e6, text: `${m} × ${n} × ${k} ${dtype}, ${busy} busy\n${(flops / us / 1e6).toPrecision(3)} TFLOP/s, ${(bytes / us / 1e3).toPrecision(3)} GB/s` };
  });
  // The roof is what was reached here: the fastest product, and the most bytes a second of any of them.
  const roof = { peak: Math.max(...points.map((point) => point.y)), slope: Math.max(...points.map((point) => point.y / point.x)) };
  const card = scatter("Matrix products: rate by intensity", points, { x: "FLOPs a byte", y: "TFLOP/s", logX: true, logY: true, roof });
  card.append(h("p", { class: "quiet" }, `The roof is the best measured here: ${roof.peak.toPrecision(3)} TFLOP/s, and ${whole(1e3 * roof.slope)} GB/s.`));
  return card;
}

function attention(rows) {
  const found = rows.filter((row) => row.op === "attention" && row.shape.chunk && row.group_size === 1 && row.shape.context !== undefined);
  if (!found.length) return null;
  const groups = Map.groupBy ? Map.groupBy(found, (row) => `${row.shape.heads}`) : new Map([["", found]]);
  const [, largest] = [...groups].sort((a, b) => b[1].length - a[1].length)[0];
  const power = (value) => (value ? 2 ** Math.round(Math.log2(value)) : 0), cells = new Map();
  for (const row of largest) {
    const x = power(row.shape.chunk), y = power(row.shape.context), key = `${x} ${y}`, known = cells.get(key);
    if (!known || row.median_us < known.value) cells.set(key, { x, y, value: row.median_us, text: `chunk ${whole(row.shape.chunk)} after ${whole(row.shape.context)} tokens\n${row.median_us.toPrecision(3)} µs, ${row.variant}` });
  }
  return heatMap("Attention of one layer", [...cells.values()], { x: "chunk, tokens", y: "context, tokens", note: `The fastest point near each power of two, stronger is longer; ${largest[0].shape.heads ?? "?"} heads.` });
}

function links(rows) {
  const found = rows.filter((row) => row.shape.bytes && row.group_size > 1 && row.median_us > 0);
  if (!found.length) return null;
  return scatter("Links: rate by size", found.map((row) => ({ x: row.shape.bytes, y: row.shape.bytes / row.median_us / 1e3, text: `${row.op}, ${row.group_size} ranks\n${whole(row.shape.bytes)} bytes in ${row.median_us.toPrecision(3)} µs` })),
    { x: "bytes", y: "GB/s", logX: true, logY: true });
}

function noise(rows) {
  const by = new Map();
  for (const row of rows) {
    const one = by.get(row.op) ?? { op: row.op, count: 0, noisy: 0, spread: [], last: row.measured_at };
    one.count += 1; one.noisy += row.noisy ? 1 : 0; one.spread.push(row.median_us > 0 ? (row.p90_us - row.p10_us) / row.median_us : 0);
    if (row.measured_at > one.last) one.last = row.measured_at;
    by.set(row.op, one);
  }
  const middle = (list) => list.sort((a, b) => a - b)[Math.floor(list.length / 2)];
  return h("div", { class: "card" }, h("h2", {}, "What was measured, how noisy, how old"), table([
    ["operation", (row) => row.op], ["points", (row) => whole(row.count), true], ["noisy", (row) => row.noisy, true], ["p10 to p90", (row) => percent(middle(row.spread)), true], ["last", (row) => when(row.last)],
  ], [...by.values()].sort((a, b) => b.count - a.count)));
}
