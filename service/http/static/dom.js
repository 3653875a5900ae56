// Elements, figures and tables. Texts are set as texts: nothing that comes from elsewhere is ever read as HTML.

export const $ = (id) => document.getElementById(id);

export function h(tag, attributes = {}, ...children) {
  const element = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") value && Object.assign(element.style, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function show(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter(Boolean));
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  if (value >= 99.95) return `${value.toFixed(0)} s`;
  if (value >= 0.9995) return `${value.toPrecision(3)} s`;
  if (value >= 0.9995e-3) return `${(1e3 * value).toPrecision(3)} ms`;
  return `${(1e6 * value).toPrecision(3)} µs`;
}

export const percent = (share, digits = 1) => (share === null || share === undefined ? "–" : `${(100 * share).toFixed(digits).replace("-", "−")} %`);
export const whole = (value) => (value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en"));
export const when = (text) => (text ? new Date(text).toLocaleString([], { dateStyle: "medium", timeStyle: "short" }) : "–");

export function figure(value, label, extra = "") {
  return h("div", { class: "figure" }, h("b", { class: extra }, value), h("span", {}, label));
}

// columns: [name, cell(row), isNumber]
export function table(columns, rows, rowClass = () => null) {
  return h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": columns.map(([name]) => name).join(", ") },
    h("table", {},
      h("thead", {}, h("tr", {}, columns.map(([name, , number]) => h(name ? "th" : "td", { scope: name ? "col" : null, class: number && "number" }, name)))),
      h("tbody", {}, rows.map((row) => h("tr", { class: rowClass(row) },
        columns.map(([, cell, number]) => h("td", { class: number && "number" }, cell(row) ?? "–")))))));
}

const tip = $("tip");
export function hint(event, text) {
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${event.clientY + height + 26 > innerHeight ? event.clientY - height - 12 : event.clientY + 16}px`;
}

export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export function debounced(wait, action) {
  let timer = 0;
  return (...given) => { clearTimeout(timer); timer = setTimeout(() => action(...given), wait); };
}
