// The page: who is there, and which of its parts is shown.

import { call, get } from "./api.js";
import { $ } from "./dom.js";
import * as hardware from "./hardware.js";
import * as jobs from "./jobs.js";
import * as plan from "./plan.js";
import * as runs from "./runs.js";

const parts = { plan, hardware, runs, jobs };
let begun = false;

async function openWith(token) {
  await call("POST", "/session", undefined, { authorization: `Bearer ${token}` });
  localStorage.setItem("isochunk-opened", "1");
}

function show(name) {
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.tab === name) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  document.querySelector("nav").hidden = name === "login";
}

async function route() {
  const name = location.hash.slice(1) in parts ? location.hash.slice(1) : "plan";
  if (!begun) return;
  show(name);
  if (name !== "jobs") jobs.stop();
  try { await parts[name].start(); } catch (error) { $("who").textContent = error.message; }
}

async function begin() {
  const { scopes } = await get("/session");
  begun = true;
  $("who").textContent = `your token may ${["read", "plan", "run"].filter((one) => scopes.includes(one)).join(", ")}`;
  await route();
  jobs.live().catch(() => null);
}

$("login-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("login-error").textContent = "";
  try { await openWith($("token").value.trim()); $("token").value = ""; await begin(); } catch (error) { $("login-error").textContent = error.message; }
});
addEventListener("signed-out", () => { localStorage.removeItem("isochunk-opened"); begun = false; jobs.stop(); show("login"); });
addEventListener("hashchange", () => { location.hash.startsWith("#token=") ? enter() : route(); });

async function enter() {
  const given = location.hash.match(/^#token=([\w-]+)/);
  // Nobody who looks over a shoulder, and no history, shall have it.
  if (given) history.replaceState(null, "", location.pathname);
  try {
    if (given) await openWith(given[1]);
    else if (!localStorage.getItem("isochunk-opened")) { show("login"); return; }
    await begin();
  } catch (error) { show("login"); $("login-error").textContent = given ? error.message : ""; }
}

enter();
