// Planning: the form, what was found, and what would be if links, prompts or ranks were others.

import { get, lastOf, post } from "./api.js";
import { $, debounced, figure, h, percent, seconds, show, table, when, whole } from "./dom.js";
import { timeline } from "./timeline.js";

const search = lastOf((signal, what) => post("/plans", what, signal));
let trace = null, costModel = null, shown = null, asked = 0, ready = false;

export async function start() {
  if (ready) { await listPlans(); return; }
  const [models, hardware] = await Promise.all([get("/models"), get("/hardware")]);
  show($("model"), models.map((model) => h("option", { value: model.name, selected: model.name === "llama-3-8b" }, `${model.name} · ${model.num_layers} layers`)));
  const measured = hardware.filter((one) => one.num_measurements);
  const names = measured.map(shortName);
  show($("hardware-id"), measured.map((one, index) => h("option", { value: one.id }, names.filter((name) => name === names[index]).length > 1 ? nameOf(one) : names[index])));
  if (!measured.length) show($("hardware-id"), h("option", { value: "" }, "nothing measured yet: see Jobs"));
  drawEmpty();
  ready = true;
  await listPlans();
}

const shortName = (one) => `${one.hardware.device_count} × ${one.hardware.device}`;
const nameOf = (one) => `${shortName(one)} · ${one.hardware.link}`;

$("plan-form").addEventListener("submit", (event) => { event.preventDefault(); plan(); });
$("trace").addEventListener("change", () => $("trace").files[0] && readTrace($("trace").files[0]));
$("cost-file").addEventListener("change", async () => {
  const file = $("cost-file").files[0];
  try { costModel = file ? JSON.parse(await file.text()) : null; } catch (error) { showError(`${file.name}: ${error.message}`); }
});
for (const [kind, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", over);
    if (kind === "drop" && event.dataTransfer.files[0]) readTrace(event.dataTransfer.files[0]);
  });
}

async function readTrace(file) {
  try {
    trace = (await file.text()).split("\n").filter((line) => line.trim()).map((line) => {
      const { input_length, timestamp, id, cached_tokens, weight, sla_ttft_s } = JSON.parse(line);
      return JSON.parse(JSON.stringify({ input_length, timestamp, id, cached_tokens, weight, sla_ttft_s }));
    });
    $("trace-summary").hidden = false;
    show($("trace-summary"), `${file.name}: ${whole(trace.length)} requests `, h("button", { type: "button", class: "link", onclick: dropTrace }, "use the lengths above instead"));
  } catch (error) { showError(`${file.name}: must be one JSON object a line (${error.message})`); }
}

function dropTrace() { trace = null; $("trace").value = ""; $("trace-summary").hidden = true; }
function showError(text) { $("plan-error").textContent = text; }

function body(changes = {}) {
  const lengths = $("prompts").value.split(/[\s,;]+/).filter(Boolean).join(",");
  const what = trace ? { requests: trace } : { prompt_lens: lengths };
  const ranks = changes.world_size ?? Number($("world-size").value);
  const where = costModel ? { cost_model: costModel, pp_size: ranks } : { model: $("model").value, hardware_id: Number($("hardware-id").value), world_size: ranks };
  return { ...what, ...where, objective: $("objective").value };
}

export async function plan(changes = {}) {
  const mine = ++asked;
  showError("");
  $("plan-button").disabled = true;
  $("results").classList.add("busy");
  try {
    const made = await search({ ...body(changes), compare: !trace || trace.length <= 200 });
    if (mine !== asked) return;
    if (changes.world_size) $("world-size").value = changes.world_size;
    display(made);
    listPlans();
  } catch (error) { if (mine === asked) showError(error.message); } finally {
    if (mine === asked) {
      $("plan-button").disabled = false;
      $("results").classList.remove("busy");
    }
  }
}

export function display(made) {
  const { report, timeline: times, plan_id: id } = made, { plan: file } = report;
  shown = { file, id };
  const head = h("div", { class: "card" }), picture = h("div", { class: "results" });
  show($("results"), head, picture, whatIf(file, head, picture), tables(report));
  headline(head, file, id);
  if (times) show(picture, timeline(file, times, "The pipeline over time"));
}

function headline(card, file, id, base = null) {
  const { parallel, predicted, policy } = file;
  const layout = layoutOf(parallel);
  const mean = predicted.ttft_s.reduce((sum, one) => sum + one, 0) / predicted.ttft_s.length;
  const change = base ? predicted.makespan_s / base - 1 : null;
  show(card,
    h("div", { class: "figures" },
      figure(seconds(predicted.makespan_s), base ? `makespan, ${change >= 0 ? "+" : "−"}${percent(Math.abs(change))} what if` : `makespan${predicted.uncertainty ? `, give or take ${percent(predicted.uncertainty)}` : ""}`),
      figure(seconds(mean), "mean TTFT"),
      figure(predicted.gap === null || predicted.gap === undefined ? "–" : `≤ ${percent(predicted.gap, 2)}`, "above the best possible", "good"),
      figure(layout, `${parallel.layer_partition.length > 1 ? `layers ${parallel.layer_partition.slice(0, 8).join("-")}, ` : ""}${whole(file.rounds.length)} rounds by ${policy ?? "hand"}`)),
    id !== null && id !== undefined && h("div", { class: "actions" },
      h("a", { class: "button", href: `/api/v1/plans/${id}/file`, download: `plan-${id}.json` }, "Download the plan"),
      h("button", { type: "button", onclick: (event) => runPlan(event.target, id) }, "Run it"),
      parallel.virtual_stages > 1 ? h("span", { class: "quiet" }, "Other engines hold one group of layers a stage.")
        : h("select", { "aria-label": "Files for an engine", onchange: (event) => exported(card, id, event.target.value) },
          h("option", { value: "" }, "For an engine …"), ["sglang", "vllm", "vllm-ascend", "trtllm", "dynamo"].map((engine) => h("option", {}, engine)))),
    h("div", { class: "exported" }));
}

async function exported(card, id, engine) {
  const place = card.querySelector(".exported");
  if (!engine) { show(place); return; }
  try {
    const made = await get(`/plans/${id}/export/${engine}`);
    show(place, h("h2", {}, `${engine} ${made.release}`), h("pre", { tabindex: "0", "aria-label": "flags" }, [...Object.entries(made.environment).map(([name, value]) => `${name}=${value}`), ...made.flags].join("\n")),
      table([["rounds by", (one) => one.rule], ["chunk", (one) => one.chunk && whole(one.chunk), true], ["predicted", (one) => seconds(one.makespan_s), true], ["longer than the plan", (one) => percent(one.makespan_s / made.plan_makespan_s - 1), true]], made.ruled),
      h("ul", { class: "quiet" }, made.cannot.map((sentence) => h("li", {}, sentence))),
      h("a", { class: "button", href: `/api/v1/plans/${id}/export/${engine}/files`, download: `plan-${id}-${engine}.zip` }, `Download the files for ${engine}`));
  } catch (error) { show(place, h("p", { class: "error", role: "alert" }, error.message)); }
}

export const layoutOf = (parallel) => [["TP", parallel.tp_size], ["PP", parallel.pp_size], ["SP", parallel.sp_size]]
  .filter(([name, size]) => size > 1 || (name === "PP" && parallel.tp_size === 1 && !(parallel.sp_size > 1))).map(([name, size]) => name + size).concat(parallel.sp_kind && parallel.sp_kind !== "none" ? [parallel.sp_kind] : [], parallel.virtual_stages > 1 ? [`× ${parallel.virtual_stages} ${parallel.stage_order ?? ""}`] : []).join(" ");

async function runPlan(button, id) {
  button.disabled = true;
  try {
    await post("/jobs", { kind: "run-plan", plan_id: id, options: { random_weights: true } });
    location.hash = "#jobs";
  } catch (error) { showError(error.message); button.after(h("span", { class: "error", role: "alert" }, error.message)); }
}

function tables(report) {
  const bar = (share) => h("span", { class: "bar", style: { width: `${Math.max(2, 90 * share)}px` } });
  const parts = [];
  const fits = report.layouts.filter((one) => one.makespan_s);
  const slowest = Math.max(...fits.map((one) => one.makespan_s));
  if (report.layouts.length) parts.push(h("div", { class: "card" }, h("h2", {}, "Layouts, the best first"), table([
    ["layout", layoutOf], ["layers", (one) => one.layer_partition.join("-") || null], ["makespan", (one) => one.makespan_s && seconds(one.makespan_s), true],
    ["", (one) => one.makespan_s && bar(one.makespan_s / slowest)], ["mean TTFT", (one) => one.makespan_s && seconds(one.mean_ttft_s), true],
    ["bubbles", (one) => one.makespan_s && percent(one.bubble_share), true], ["GiB a rank", (one) => one.memory_bytes ? (one.memory_bytes / 2 ** 30).toFixed(1) : null, true],
    ["why not", (one) => one.refusal ?? (one.proven_worse ? `no plan takes less than ${seconds(one.floor_s)}` : one.estimated_worse ? `about ${seconds(one.estimate_s)} by an estimate` : one.assumed?.length ? `assumes links: ${one.assumed.join(", ")}` : one.extrapolates ? "beyond the measured range" : "")],
  ], report.layouts.slice(0, 40), (one) => (one.makespan_s && !one.refusal ? (one === report.layouts[0] ? "best" : null) : "refused"))));
  if (report.why) parts.push(why(report.why));
  const policies = report.policies.length ? report.policies : report.replays;
  const worst = Math.max(...policies.map((one) => one.makespan_s));
  if (policies.length) parts.push(h("div", { class: "card" }, h("h2", {}, report.replays.length ? "Policies, each seeing a request when it arrives" : "Policies on this layout"), table([
    ["policy", (one) => one.policy], ["rounds", (one) => whole(one.num_rounds), true], ["makespan", (one) => seconds(one.makespan_s), true], ["", (one) => bar(one.makespan_s / worst)],
    ["mean TTFT", (one) => seconds(one.mean_ttft_s), true], ["p90 TTFT", (one) => seconds(one.p90_ttft_s), true],
    ...(report.replays.length ? [["tokens/s", (one) => whole(one.tokens_per_s), true]] : [["bubbles", (one) => percent(one.bubble_share), true], ["above the bound", (one) => percent(one.gap, 2), true]]),
  ], policies, (one) => (one.policy === report.plan.policy ? "best" : null))));
  if (report.held_out.length) parts.push(h("div", { class: "card" }, h("h2", {}, "How sure: measured points that the fit had not seen"), table([
    ["what", (one) => one.op], ["points left out", (one) => one.num_points, true], ["median error", (one) => percent(one.median), true], ["p90", (one) => percent(one.p90), true], ["worst", (one) => percent(one.worst), true],
  ], report.held_out)));
  return parts;
}

// A layout in words of the command line, as `layoutOf` writes it.
const shortLayout = (name) => name?.replace(/^TP1 (?=.)/, "").replace(/ PP1$/, "").replace(/ x(\d)/, " × $1");

function why(explanation) {
  const names = Object.keys(explanation.families[0]?.seconds ?? {});
  const wins = (label, winners, value) => winners?.length > 1 && h("div", {}, h("h3", {}, label), table([
    ["if", value, true], ["best", (one) => shortLayout(one.layout) ?? "none has room"], ["ahead of others by", (one) => (one.lead ? percent(one.lead) : null), true],
  ], winners));
  return h("div", { class: "card" }, h("h2", {}, "Why, and where else another would win"),
    names.length > 0 && table([["the best of its kind", (one) => shortLayout(one.layout)], ...names.map((name) => [name.replace(/_s$/, "").replaceAll("_", " "), (one) => (typeof one.seconds[name] === "number" ? seconds(one.seconds[name]) : null), true])], explanation.families),
    h("div", { class: "split even" }, wins("Links faster or slower", explanation.by_link, (one) => `× ${+one.link_factor.toPrecision(2)}`),
      wins("Longer or shorter prompts", explanation.by_length, (one) => `${whole(one.prompt_tokens)} tokens`), wins("More or fewer requests", explanation.by_batch, (one) => `${whole(one.num_requests)} requests`)));
}

function whatIf(file, head, picture) {
  if (!file.cost_model || file.requests.some((one) => one.arrival_s > 0) && file.requests.length > 300) return null;
  const base = file.predicted.makespan_s;
  const settings = { link: 0, prompt: 0 };
  const error = h("p", { class: "error", role: "alert" });
  const again = lastOf((signal, what) => post("/plans", what, signal));
  let turn = 0;
  const replan = debounced(120, async () => {
    const mine = ++turn, link = 2 ** settings.link, prompt = 2 ** settings.prompt;
    const hop = file.cost_model.hop ?? { latency_s: 0, token_s: 0 };
    const cost = { ...file.cost_model, hop: { latency_s: hop.latency_s / link, token_s: hop.token_s / link } };
    const requests = file.requests.map((one) => ({
      id: one.id, input_length: Math.max(one.cached_tokens + 1, Math.round(one.prompt_tokens * prompt)), cached_tokens: one.cached_tokens, timestamp: 1e3 * one.arrival_s,
    }));
    error.textContent = "";
    picture.classList.add("busy");
    try {
      const made = await again({ cost_model: cost, pp_size: file.parallel.pp_size, requests, keep: false, objective: $("objective").value });
      if (mine !== turn) return;
      const changed = settings.link !== 0 || settings.prompt !== 0;
      const mixed = { ...made.report.plan, parallel: file.parallel };
      headline(head, mixed, changed ? null : shown.id, changed ? base : null);
      show(picture, timeline(made.report.plan, made.timeline, changed ? "What if" : "The pipeline over time"));
    } catch (problem) { if (mine === turn) error.textContent = problem.message; } finally { if (mine === turn) picture.classList.remove("busy"); }
  });
  const slider = (name, label, low, high, format, change) => {
    const out = h("output", { for: name }, format(0));
    return h("div", { class: "slider" }, h("label", { for: name }, label, out),
      h("input", { id: name, type: "range", min: low, max: high, step: 0.25, value: 0, oninput: (event) => { const value = Number(event.target.value); out.textContent = format(value); change(value); } }));
  };
  const times = (value) => `× ${+(2 ** value).toPrecision(2)}`;
  const ranks = Number($("world-size").value), choices = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32];
  const at = choices.findIndex((one) => one >= ranks);
  const out = h("output", { for: "if-ranks" }, `${ranks}`);
  const onRanks = debounced(500, (count) => plan({ world_size: count }));
  return h("div", { class: "card" }, h("h2", {}, "What if"), h("div", { class: "sliders" },
    slider("if-prompt", "Prompts were longer", -3, 3, times, (value) => { settings.prompt = value; replan(); }),
    file.parallel.pp_size > 1 && slider("if-link", "Links between stages were faster", -6, 6, times, (value) => { settings.link = value; replan(); }),
    h("div", { class: "slider" }, h("label", { for: "if-ranks" }, "Ranks were", out),
      h("input", { id: "if-ranks", type: "range", min: 0, max: choices.length - 1, step: 1, value: at < 0 ? choices.length - 1 : at,
        oninput: (event) => { const count = choices[Number(event.target.value)]; out.textContent = `${count}`; onRanks(count); } }))),
    h("p", { class: "quiet" }, "Prompts and links replan this layout as you move them; ranks search all layouts anew. Nothing of it is kept but what ranks bring."), error);
}

async function listPlans() {
  const { items } = await get("/plans?limit=8");
  $("kept-card").hidden = !items.length;
  show($("kept-plans"), table([
    ["plan", (one) => h("button", { type: "button", class: "link", onclick: () => open(one.id) }, `plan ${one.id}`)],
    ["model", (one) => one.summary.model ?? "a cost model"], ["layout", (one) => layoutOf(one.summary)], ["policy", (one) => one.summary.policy],
    ["requests", (one) => whole(one.summary.num_requests), true], ["rounds", (one) => whole(one.summary.num_rounds), true],
    ["predicted", (one) => seconds(one.summary.predicted_s), true], ["runs", (one) => one.num_runs, true], ["made", (one) => when(one.created_at)],
  ], items));
}

async function open(id) {
  try {
    const { plan: file, timeline: times } = await get(`/plans/${id}`);
    if (!file.predicted) { showError(`plan ${id} predicts nothing`); return; }
    display({ plan_id: id, timeline: times, report: { plan: file, layouts: [], policies: [], replays: [], held_out: [] } });
    scrollTo({ top: 0, behavior: "smooth" });
  } catch (error) { showError(error.message); }
}

function drawEmpty() {
  const bars = [];
  for (let stage = 0; stage < 3; stage++) {
    for (let round = 0; round < 7; round++) {
      bars.push(h("svg:rect", { class: "dot", x: 8 + stage * 34 + round * 33, y: 8 + stage * 26, width: 30, height: 20, rx: 4, opacity: 0.35 + 0.09 * ((round * 2 + stage) % 7) }));
    }
  }
  show($("empty-picture"), bars);
}
