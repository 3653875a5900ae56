// Runs: what was predicted beside what was measured.

import { all, get } from "./api.js";
import { scatter } from "./charts.js";
import { $, figure, h, percent, seconds, show, table, when, whole } from "./dom.js";
import { colour, endOf, timeline } from "./timeline.js";

const FIRST = 25, MOST = 2000;
let runs = [], about = new Map(), machines = new Map();
const chosen = { hardware: "", model: "", status: "" };

export async function start() {
  const [found, plans, hardware] = await Promise.all([all("/runs", MOST), all("/plans", MOST), get("/hardware")]);
  runs = found;
  about = new Map(plans.map((plan) => [plan.id, plan.summary]));
  machines = new Map(hardware.map((one) => [one.id, `${one.hardware.device_count} × ${one.hardware.device} · ${one.hardware.link}`]));
  if (!runs.length) {
    show($("runs-top")); show($("run-detail"));
    show($("runs-list"), h("p", { class: "quiet" }, "No plan was run yet. Make one and press “Run it”."));
    return;
  }
  draw(FIRST);
}

const modelOf = (run) => about.get(run.plan_id)?.model ?? "other models";
const errorOf = (run) => (run.makespan_s && run.predicted_makespan_s ? run.predicted_makespan_s / run.makespan_s - 1 : null);
const widthOf = (run) => about.get(run.plan_id)?.uncertainty ?? null;

function filter(name, label, values) {
  const distinct = [...new Set(values)];
  if (distinct.length < 2) return null;
  return h("select", { "aria-label": label, onchange: (event) => { chosen[name] = event.target.value; draw(FIRST); } },
    h("option", { value: "" }, label), distinct.map((value) => h("option", { value: String(value), selected: chosen[name] === String(value) }, name === "hardware" ? machines.get(value) ?? `hardware ${value}` : value)));
}

function draw(most) {
  const kept = runs.filter((run) => (!chosen.hardware || String(run.hardware_id) === chosen.hardware) && (!chosen.model || modelOf(run) === chosen.model) && (!chosen.status || run.status === chosen.status));
  const done = kept.filter((run) => errorOf(run) !== null), names = [...new Set(runs.map(modelOf))];
  const errors = done.map((run) => Math.abs(errorOf(run))).sort((a, b) => a - b);
  const wide = done.filter((run) => widthOf(run) !== null), within = wide.filter((run) => Math.abs(errorOf(run)) <= widthOf(run)).length;
  const card = h("div", { class: "card" }, h("h2", {}, "Predicted against measured"),
    h("div", { class: "filters" }, filter("hardware", "All hardware", runs.map((run) => run.hardware_id)), filter("model", "All models", runs.map(modelOf)), filter("status", "Every end", runs.map((run) => run.status))),
    h("div", { class: "figures" }, figure(whole(kept.length), "runs"), figure(percent(errors[Math.floor(errors.length / 2)]), "median error"),
      figure(percent(errors[Math.floor(0.9 * errors.length)]), "90 % are within"), wide.length > 0 && figure(percent(within / wide.length, 0), "within the stated width"),
      figure(whole(kept.filter((run) => run.status === "failed" || run.status === "lost").length), "failed or lost")),
    names.length > 1 && h("p", { class: "legend" }, names.map((name, index) => h("span", {}, h("i", { style: { background: colour(index) } }), name))));
  const dot = (run) => (names.length > 1 ? colour(names.indexOf(modelOf(run))) : undefined);
  const points = done.map((run) => ({ x: run.predicted_makespan_s, y: run.makespan_s, width: widthOf(run), fill: dot(run),
    text: `run ${run.id} of plan ${run.plan_id}, ${modelOf(run)}\npredicted ${seconds(run.predicted_makespan_s)}${widthOf(run) === null ? "" : ` ± ${percent(widthOf(run))}`}, measured ${seconds(run.makespan_s)}` }));
  const over = done.toReversed().map((run, index) => ({ x: index + 1, y: 100 * errorOf(run), fill: dot(run), text: `run ${run.id}, ${when(run.started_at)}\n${percent(errorOf(run))}` }));
  show($("runs-top"), card, points.length > 0 && scatter("Every run, with the stated width", points, { x: "predicted, s", y: "measured, s", logX: true, logY: true, diagonal: true }),
    over.length > 1 && scatter("How the error went", over, { x: "run", y: "predicted over measured, %" }));
  show($("runs-list"), table([
    ["run", (run) => h("button", { type: "button", class: "link", onclick: () => open(run) }, `run ${run.id}`)], ["status", (run) => h("span", { class: `tag ${run.status}` }, run.status)],
    ["model", modelOf], ["plan", (run) => run.plan_id, true], ["predicted", (run) => seconds(run.predicted_makespan_s), true], ["measured", (run) => seconds(run.makespan_s), true],
    ["error", (run) => (errorOf(run) === null ? null : percent(errorOf(run))), true],
    ["MFU", (run) => (run.mfu ? percent(run.mfu) : null), true], ["began", (run) => when(run.started_at)], ["what went wrong", (run) => (run.error ?? "").split("\n").at(-1).slice(0, 160)],
  ], kept.slice(0, most)), kept.length > most && h("button", { type: "button", onclick: () => draw(most + 200) }, `${whole(kept.length - most)} more`));
}

async function open(run) {
  const [rounds, kept] = await Promise.all([get(`/runs/${run.id}/rounds`), get(`/plans/${run.plan_id}`)]);
  const parts = [h("div", { class: "card" }, h("h2", {}, `Run ${run.id} of plan ${run.plan_id}`),
    h("div", { class: "figures" }, figure(seconds(run.makespan_s), "measured"), figure(seconds(run.predicted_makespan_s), "predicted"),
      errorOf(run) !== null && figure(percent(errorOf(run)), widthOf(run) === null ? "error" : `error; ± ${percent(widthOf(run))} stated`), run.mfu && figure(percent(run.mfu), "MFU"), drift(rounds)),
    h("div", { class: "actions" }, h("a", { class: "button", href: `/api/v1/runs/${run.id}/trace`, download: `run-${run.id}.trace.json` }, "Trace for Perfetto"),
      h("span", { class: "quiet" }, "Open it at ", h("a", { href: "https://ui.perfetto.dev", target: "_blank", rel: "noreferrer noopener" }, "ui.perfetto.dev"), " (another site; the file stays in your browser).")))];
  if (run.error) {
    const where = [["rank", run.failed_rank], ["stage", run.failed_stage], ["round", run.failed_round]].filter(([, at]) => at !== null).map(([name, at]) => `${name} ${at}`).join(", ");
    parts.push(h("div", { class: "card" }, h("h2", {}, `What went wrong${where ? `: ${where}` : ""}`), h("pre", { tabindex: "0", "aria-label": "what went wrong" }, run.error)));
  }
  let measured = null;
  if (rounds.length) {
    const stages = 1 + Math.max(...rounds.map((one) => one.stage)), count = 1 + Math.max(...rounds.map((one) => one.round));
    const start_s = Array.from({ length: count }, () => Array(stages).fill(0)), finish_s = start_s.map((row) => [...row]);
    for (const one of rounds) { start_s[one.round][one.stage] = one.start_s; finish_s[one.round][one.stage] = one.finish_s; }
    measured = { num_rounds: count, start_s, finish_s };
  }
  // Both over the same time, so that what took longer is longer.
  const until = Math.max(0, ...[measured, kept.timeline].filter(Boolean).map(endOf));
  if (measured) parts.push(timeline(kept.plan, measured, "Measured", until));
  if (kept.timeline) parts.push(timeline(kept.plan, kept.timeline, "The same rounds, predicted", until));
  show($("run-detail"), h("div", { class: "results" }, parts));
  $("run-detail").scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
}

// How much slower, against the prediction, the second half of the rounds ran than the first.
function drift(rounds) {
  const ratios = rounds.filter((one) => one.predicted_s).sort((a, b) => a.start_s - b.start_s).map((one) => (one.finish_s - one.start_s) / one.predicted_s);
  if (ratios.length < 8) return null;
  const middle = (list) => [...list].sort((a, b) => a - b)[Math.floor(list.length / 2)], half = Math.floor(ratios.length / 2);
  return figure(percent(middle(ratios.slice(half)) / middle(ratios.slice(0, half)) - 1), "drift from the first half to the second");
}
