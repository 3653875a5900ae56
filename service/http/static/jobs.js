// Jobs: started, followed live, cancelled, tried again; and the workers that run them.

import { follow, get, post } from "./api.js";
import { $, h, show, when } from "./dom.js";

const cards = new Map();
let timer = 0;

export async function start() {
  const models = await get("/models");
  show($("job-model"), models.map((model) => h("option", { value: model.name }, model.name)));
  await refresh();
  clearInterval(timer);
  timer = setInterval(refresh, 2500);
}

let shown = null;
async function listWorkers() {
  const workers = await get("/workers");
  const living = workers.filter((worker) => worker.alive), keys = [...new Set(workers.map((worker) => keyOf(worker)))];
  const now = JSON.stringify([keys, living.map((worker) => worker.hardware)]);
  if (now === shown) return;
  shown = now;
  const chosen = $("job-worker").value;
  show($("job-worker"), keys.map((key) => h("option", { value: key, selected: key === chosen }, key)));
  show($("workers"), living.length ? living.map((worker) => h("dl", {}, h("dt", {}, worker.hardware.machine), h("dd", {}, keyOf(worker)))) : h("p", { class: "quiet" }, "None is there: isochunk worker"));
}

export function stop() { clearInterval(timer); }
const keyOf = (worker) => `${worker.hardware.device} x${worker.hardware.device_count}`;
const isOver = (job) => !["queued", "running"].includes(job.status);

$("job-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("job-error").textContent = "";
  const options = { budget_s: Number($("job-budget").value), ...($("job-context").value ? { context_length: Number($("job-context").value) } : {}) };
  try {
    await post("/jobs", { kind: "profile", model: $("job-model").value, hardware: $("job-worker").value || null, options });
    await refresh();
  } catch (error) { $("job-error").textContent = error.message; }
});

export async function live() {
  const { items } = await get("/jobs?limit=50");
  const count = items.filter((job) => !isOver(job)).length;
  $("jobs-live").hidden = !count;
  $("jobs-live").textContent = String(count);
  return items;
}

async function refresh() {
  const [items] = await Promise.all([live(), listWorkers()]);
  if (!items.length) { show($("job-list"), h("div", { class: "card empty" }, h("h2", {}, "No jobs yet"), h("p", { class: "quiet" }, "Measure a model on a worker, or make a plan and run it. Jobs go on when the service or a worker is restarted."))); return; }
  const list = $("job-list");
  if (!list.querySelector("[data-job]")) show(list);
  items.forEach((job, index) => {
    let card = cards.get(job.id);
    if (!card) { card = jobCard(job); cards.set(job.id, card); }
    card.update(job);
    if (list.children[index] !== card.element) list.insertBefore(card.element, list.children[index] ?? null);
  });
}

function jobCard(job) {
  const status = h("span", { class: "tag" }), about = h("span", { class: "quiet" }), actions = h("span", { class: "actions" });
  const log = h("pre", { tabindex: "0", "aria-label": "log", hidden: true }), bar = h("progress", { max: 1, value: 0, hidden: true, "aria-label": "progress" }), error = h("p", { class: "error" });
  const subject = job.spec.model ?? job.spec.plan_id ?? "";
  const element = h("div", { class: "card", "data-job": job.id }, h("div", { class: "job-head" }, h("h2", {}, `${job.spec.kind} ${subject}`), status, about, actions), bar, error, log);
  let source = null, seen = 0, known = null;

  function watch() {
    if (source) return;
    log.hidden = false;
    source = follow(job.id, seen);
    source.addEventListener("log", (event) => {
      seen += 1;
      const { lines } = JSON.parse(event.data), stick = log.scrollTop + log.clientHeight >= log.scrollHeight - 30;
      log.append(lines.join("\n") + "\n");
      const steps = [...lines.join("\n").matchAll(/(\d+) of (\d+) points|layer (\d+) of (\d+)/g)].at(-1);
      if (steps) { bar.hidden = false; bar.max = Number(steps[2] ?? steps[4]); bar.value = Number(steps[1] ?? steps[3]); }
      if (stick) log.scrollTop = log.scrollHeight;
    });
    source.addEventListener("job", (event) => {
      const change = JSON.parse(event.data);
      update({ ...job, ...change });
      if (!["queued", "running"].includes(change.status)) { source.close(); source = null; bar.hidden = true; live(); }
    });
    source.onerror = () => { source?.close(); source = null; };
  }

  async function act(what) {
    try { await post(`/jobs/${job.id}/${what}`); await refresh(); } catch (problem) { error.textContent = problem.message; }
  }

  function update(latest) {
    about.textContent = `${when(job.created_at)} · ${latest.worker ?? job.hardware}${latest.attempts > 1 ? ` · taken up ${latest.attempts} times` : ""}`;
    if (known === latest.status) { if (!isOver(latest)) watch(); return; }
    known = latest.status;
    status.textContent = known; status.className = `tag ${known}`;
    error.textContent = latest.error ?? "";
    show(actions, isOver(latest)
      ? [log.hidden && h("button", { type: "button", onclick: (event) => { event.target.remove(); watch(); } }, "Log"), h("button", { type: "button", onclick: () => act("retry") }, "Try again")]
      : h("button", { type: "button", onclick: () => act("cancel") }, "Cancel"));
    if (!isOver(latest)) watch();
  }
  return { element, update };
}
