// Runs: what was predicted beside what was measured.

import { all, get } from "./api.js";
import { scatter } from "./charts.js";
import { $, figure, h, percent, seconds, show, table, when } from "./dom.js";
import { timeline } from "./timeline.js";

export async function start() {
  const runs = await all("/runs", 1000);
  if (!runs.length) {
    show($("runs-top"));
    show($("runs-list"), h("p", { class: "quiet" }, "No plan was run yet. Make one and press “Run it”."));
    return;
  }
  const done = runs.filter((run) => run.makespan_s && run.predicted_makespan_s);
  const errors = done.map((run) => Math.abs(run.predicted_makespan_s / run.makespan_s - 1)).sort((a, b) => a - b);
  const card = h("div", { class: "card" }, h("h2", {}, "Predicted against measured"), h("div", { class: "figures" },
    figure(String(runs.length), "runs"), figure(percent(errors[Math.floor(errors.length / 2)]), "median error"),
    figure(percent(errors[Math.floor(0.9 * errors.length)]), "90 % are within"), figure(String(runs.filter((run) => run.status === "failed" || run.status === "lost").length), "failed or lost")));
  const points = done.map((run) => ({ x: run.predicted_makespan_s, y: run.makespan_s, text: `run ${run.id} of plan ${run.plan_id}\npredicted ${seconds(run.predicted_makespan_s)}, measured ${seconds(run.makespan_s)}` }));
  const over = done.toReversed().map((run, index) => ({ x: index + 1, y: 100 * (run.predicted_makespan_s / run.makespan_s - 1), text: `run ${run.id}, ${when(run.started_at)}` }));
  show($("runs-top"), card, points.length > 0 && scatter("Every run", points, { x: "predicted, s", y: "measured, s", logX: true, logY: true, diagonal: true }),
    over.length > 1 && scatter("How the error went", over, { x: "run", y: "predicted over measured, %" }));
  show($("runs-list"), table([
    ["run", (run) => h("button", { type: "button", class: "link", onclick: () => open(run) }, `run ${run.id}`)], ["status", (run) => h("span", { class: `tag ${run.status}` }, run.status)],
    ["plan", (run) => run.plan_id, true], ["predicted", (run) => seconds(run.predicted_makespan_s), true], ["measured", (run) => seconds(run.makespan_s), true],
    ["error", (run) => (run.makespan_s && run.predicted_makespan_s ? percent(run.predicted_makespan_s / run.makespan_s - 1) : null), true],
    ["MFU", (run) => (run.mfu ? percent(run.mfu) : null), true], ["began", (run) => when(run.started_at)], ["what went wrong", (run) => run.error ?? ""],
  ], runs.slice(0, 100)));
}

async function open(run) {
  const [rounds, kept] = await Promise.all([get(`/runs/${run.id}/rounds`), get(`/plans/${run.plan_id}`)]);
  const parts = [];
  if (rounds.length) {
    const stages = 1 + Math.max(...rounds.map((one) => one.stage)), count = 1 + Math.max(...rounds.map((one) => one.round));
    const start_s = Array.from({ length: count }, () => Array(stages).fill(0)), finish_s = start_s.map((row) => [...row]);
    for (const one of rounds) { start_s[one.round][one.stage] = one.start_s; finish_s[one.round][one.stage] = one.finish_s; }
    parts.push(timeline(kept.plan, { num_rounds: count, start_s, finish_s }, `Run ${run.id}, measured`));
  }
  if (kept.timeline) parts.push(timeline(kept.plan, kept.timeline, "The same rounds, predicted"));
  if (run.error) parts.push(h("div", { class: "card" }, h("h2", {}, "What went wrong"), h("pre", { tabindex: "0" }, run.error)));
  show($("run-detail"), h("div", { class: "results" }, parts));
  $("run-detail").scrollIntoView({ behavior: "smooth" });
}
