// Small charts as SVG: points over two axes, linear or logarithmic, and heat maps.

import { h, hint } from "./dom.js";

const W = 460, H = 270, L = 56, R = 12, T = 12, B = 38;

function scale(values, log, from, to) {
  const low = Math.min(...values), high = Math.max(...values);
  let [a, b] = log ? [Math.log10(low), Math.log10(high)] : [Math.min(0, low), Math.max(0, high)];
  if (log && b - a < 0.1) { a -= 0.1; b += 0.1; }
  const span = b - a || 1;
  const at = (value) => from + (((log ? Math.log10(value) : value) - a) / span) * (to - from);
  let marks;
  if (log) {
    // Powers of ten; where few of them are in sight, also twice and five times as much; then the ends.
    const powers = Array.from({ length: Math.ceil(b) - Math.floor(a) + 1 }, (_, index) => 10 ** (Math.floor(a) + index));
    const inSight = (mark) => Math.log10(mark) >= a && Math.log10(mark) <= b;
    marks = [powers, powers.flatMap((power) => [power, 2 * power, 5 * power])].find((some) => some.filter(inSight).length > 2) ?? [low, Math.sqrt(low * high), high];
  } else {
    const step = 10 ** Math.floor(Math.log10(span / 3)) * (span / 3 / 10 ** Math.floor(Math.log10(span / 3)) > 5 ? 5 : span / 3 / 10 ** Math.floor(Math.log10(span / 3)) > 2 ? 2 : 1);
    const first = Math.ceil(a / step - 1e-9);
    marks = Array.from({ length: Math.floor(b / step + 1e-9) - first + 1 }, (_, index) => (first + index) * step);
  }
  return { at, marks: marks.filter((mark) => { const x = log ? Math.log10(mark) : mark; return x >= a - 1e-9 && x <= b + 1e-9; }) };
}

const short = (value) => {
  for (const [unit, size] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["K", 1e3]]) if (Math.abs(value) >= size) return `${+(value / size).toPrecision(3)}${unit}`;
  return value && Math.abs(value) < 1e-2 ? value.toExponential(0) : String(+value.toPrecision(3));
};
const binary = (value) => (value >= 2 ** 20 ? `${value / 2 ** 20}M` : value >= 1024 ? `${value / 1024}K` : String(value));

// points: {x, y, text, fill?, width?}; width: relative, drawn as a whisker around y = x, where the prediction says that y is.
// options: x, y (labels), logX, logY, diagonal (the line y = x), roof ({peak, slope}: y is at most either)
export function scatter(title, points, { x: xLabel, y: yLabel, logX = false, logY = false, diagonal = null, roof = null, format = short }) {
  const shared = diagonal === null ? [] : points.map((point) => point.x).concat(points.map((point) => point.y));
  const X = scale(diagonal === null ? points.map((point) => point.x) : shared, logX, L, W - R);
  const Y = scale(diagonal === null ? points.map((point) => point.y) : shared, logY, H - B, T);
  const children = [];
  for (const mark of X.marks) children.push(h("svg:line", { class: "axis", x1: X.at(mark), x2: X.at(mark), y1: T, y2: H - B }), h("svg:text", { x: X.at(mark), y: H - B + 15, "text-anchor": "middle" }, format(mark)));
  for (const mark of Y.marks) children.push(h("svg:line", { class: "axis", x1: L, x2: W - R, y1: Y.at(mark), y2: Y.at(mark) }), h("svg:text", { x: L - 6, y: Y.at(mark) + 4, "text-anchor": "end" }, format(mark)));
  if (diagonal !== null) {
    const low = Math.min(...shared), high = Math.max(...shared);
    children.push(h("svg:path", { class: "guide", d: `M${X.at(low)},${Y.at(low)} L${X.at(high)},${Y.at(high)}` }));
  }
  if (roof) {
    const at = [...new Set([...points.map((point) => point.x), roof.peak / roof.slope])].sort((a, b) => a - b);
    const low = Math.min(...points.map((point) => point.y));
    const line = at.map((x) => [x, Math.min(roof.peak, roof.slope * x)]).filter(([, y]) => y >= low);
    children.push(h("svg:path", { class: "guide", d: line.map(([x, y], index) => `${index ? "L" : "M"}${X.at(x)},${Math.max(T, Y.at(y))}`).join(" ") }));
  }
  for (const point of points) {
    if (point.width) children.push(h("svg:line", { class: "whisker", x1: X.at(point.x), x2: X.at(point.x), y1: Y.at(point.x * (1 + point.width)), y2: Y.at(point.x * Math.max(0.01, 1 - point.width)) }));
    children.push(h("svg:circle", { class: "dot", cx: X.at(point.x), cy: Y.at(point.y), r: 3.5, style: point.fill && { fill: point.fill },
      onpointermove: (event) => hint(event, point.text), onpointerleave: (event) => hint(event, null) }));
  }
  children.push(h("svg:text", { x: (L + W) / 2, y: H - 5, "text-anchor": "middle" }, xLabel),
    h("svg:text", { x: 12, y: (H - B) / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${(H - B) / 2})` }, yLabel));
  return h("div", { class: "card" }, h("h2", {}, title),
    h("svg:svg", { viewBox: `0 0 ${W} ${H}`, class: "chart", role: "img", "aria-label": `${title}: ${yLabel} over ${xLabel}, ${points.length} points` }, children));
}

// cells: {x, y, value, text} at a few distinct x and y
export function heatMap(title, cells, { x: xLabel, y: yLabel, note }) {
  const xs = [...new Set(cells.map((cell) => cell.x))].sort((a, b) => a - b), ys = [...new Set(cells.map((cell) => cell.y))].sort((a, b) => a - b);
  const values = cells.map((cell) => Math.log(cell.value)), low = Math.min(...values), high = Math.max(...values);
  const w = (W - L - R) / xs.length, t = (H - B - T) / ys.length, every = Math.ceil(xs.length / 8), everyY = Math.ceil(ys.length / 9);
  const children = cells.map((cell) => h("svg:rect", {
    x: L + xs.indexOf(cell.x) * w, y: T + (ys.length - 1 - ys.indexOf(cell.y)) * t, width: Math.max(1, w - 1), height: Math.max(1, t - 1), rx: 2, class: "dot",
    "fill-opacity": 0.08 + (0.92 * (Math.log(cell.value) - low)) / (high - low || 1),
    onpointermove: (event) => hint(event, cell.text), onpointerleave: (event) => hint(event, null),
  }));
  xs.forEach((value, index) => index % every || children.push(h("svg:text", { x: L + (index + 0.5) * w, y: H - B + 15, "text-anchor": "middle" }, binary(value))));
  ys.forEach((value, index) => index % everyY || children.push(h("svg:text", { x: L - 6, y: T + (ys.length - 0.5 - index) * t + 4, "text-anchor": "end" }, binary(value))));
  children.push(h("svg:text", { x: (L + W) / 2, y: H - 5, "text-anchor": "middle" }, xLabel),
    h("svg:text", { x: 12, y: (H - B) / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${(H - B) / 2})` }, yLabel));
  for (const child of children) if (child.tagName === "rect") child.style.fillOpacity = child.getAttribute("fill-opacity");
  return h("div", { class: "card" }, h("h2", {}, title), note && h("p", { class: "quiet" }, note),
    h("svg:svg", { viewBox: `0 0 ${W} ${H}`, class: "chart", role: "img", "aria-label": `${title}: ${yLabel} over ${xLabel}` }, children));
}
