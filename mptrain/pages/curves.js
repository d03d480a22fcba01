"use strict";

// Curves over the steps, several in one plot, each named at its right end. Needs tip.js.
//
// drawCurves(box, { steps, series, log, label }) fills a box of class "plot curves". Of each series: `name`; `kind`, a class
// that gives the colour ("reference", "series-1", ...); `values`, one for each step, null where there is none; and `raw`, which
// is drawn faintly behind them, or nothing. On a logarithmic axis all values must be above 0.

const NAME_HEIGHT = 17; // pixels

function ticks(low, high, log) {
  if (log) {
    const decades = Math.log10(high / low);
    const marks = decades > 4 ? [1] : decades > 1.5 ? [1, 3] : [1, 2, 5];
    const found = [];
    for (let k = Math.floor(Math.log10(low)); k <= Math.ceil(Math.log10(high)); k++) {
      for (const mark of marks) found.push(mark * 10 ** k);
    }
    return found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
  }
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((mark) => mark * power >= rough) * power;
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(k * step + 0); // -0 would be written with its sign
  return found;
}

// A number in about three digits, as magnitude() in mptrain/pages/numbers.py writes it.
function magnitude(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size === 0 || (size >= 1000 && size < 1e6)) return Math.round(value).toLocaleString("en").replace("-", "−");
  if (size >= 0.01 && size < 1000) return String(Number(value.toPrecision(3))).replace("-", "−");
  const [digits, exponent] = value.toExponential(1).split("e");
  return `${digits}e${Number(exponent)}`.replaceAll("-", "−");
}

// The ends of the axis: those of the values, and some room where all are the same.
function range(series, log) {
  const shown = series.flatMap(({ values, raw }) => [...values, ...(raw || [])]).filter((value) => value !== null);
  if (!shown.length) return log ? [0.1, 1] : [0, 1];
  let [low, high] = [shown.reduce((a, b) => Math.min(a, b)), shown.reduce((a, b) => Math.max(a, b))];
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const room = log ? (high / low) ** 0.04 : 0.04 * (high - low);
  return log ? [low / room, high * room] : [low - room, high + room];
}

function pathOf(steps, values, x, y) {
  let path = "";
  let pen = "M";
  values.forEach((value, i) => {
    const dot = pen === "M" ? "h0" : ""; // so that a value between two that are missing is seen
    path += value === null ? "" : `${pen}${x(steps[i]).toFixed(2)} ${y(value).toFixed(2)}${dot}`;
    pen = value === null ? "M" : "L";
  });
  return path;
}

// Moves names apart that would cover each other: downwards, and up again where that leaves the plot.
function spread(tops, height) {
  const order = tops.map((_, i) => i).sort((a, b) => tops[a] - tops[b]);
  order.forEach((i, place) => {
    if (place) tops[i] = Math.max(tops[i], tops[order[place - 1]] + NAME_HEIGHT);
  });
  let limit = height;
  for (const i of order.reverse()) limit = (tops[i] = Math.min(tops[i], limit)) - NAME_HEIGHT;
  return tops;
}

// Each name beside the end of its curve, which is the plot's but for a run that has no values from some step on.
function names({ steps, series }, x, y, height) {
  const ends = series.map(({ values }) => values.findLastIndex((value) => value !== null));
  const lasts = series.map(({ values }, i) => values[ends[i]]);
  const tops = spread(lasts.map((last) => (last === undefined ? height : (y(last) / 100) * height)), height);
  return series.map(({ name, kind }, i) => {
    const text = lasts[i] === undefined ? `${name} –` : name;
    const left = lasts[i] === undefined ? 100 : x(steps[ends[i]]);
    return html("span", { class: `name ${kind}`, style: `left: ${left}%; top: ${tops[i] - NAME_HEIGHT / 2}px` }, text);
  });
}

function stepLabels(first, last) {
  const middle = Math.round((first + last) / 2);
  const shown = middle > first && middle < last ? [[middle, ""]] : [];
  return [[first, "first"], ...shown, [last, "last"]].map(([step, side]) => {
    const text = `${side === "first" ? "step " : ""}${step.toLocaleString("en")}`;
    return html("span", { class: `x ${side}`, style: `left: ${(100 * (step - first)) / Math.max(1, last - first)}%` }, text);
  });
}

// What is under the pointer: the step nearest to it, and each series' value there.
function followPointer(box, plot, { steps, series }, x) {
  const cursor = svg("path", { class: "cursor" });
  plot.append(cursor);
  tipOver(box, (event) => {
    const { left, width } = plot.getBoundingClientRect();
    const at = (100 * (event.clientX - left)) / width;
    const i = steps.reduce((best, step, j) => (Math.abs(x(step) - at) < Math.abs(x(steps[best]) - at) ? j : best), 0);
    cursor.setAttribute("d", `M${x(steps[i])} 0V100`);
    const lines = series.map(({ name, values, raw }) => {
      const own = raw ? `, ${magnitude(raw[i])} in this step` : "";
      return html("div", {}, `${name} ${magnitude(values[i])}${own}`);
    });
    return [html("strong", {}, `step ${steps[i].toLocaleString("en")}`), ...lines];
  });
  box.addEventListener("pointerleave", () => cursor.removeAttribute("d"));
}

function drawCurves(box, { steps, series, log, label }) {
  const [low, high] = range(series, log);
  const [first, last] = [steps[0], steps.at(-1)];
  const on = log ? Math.log : (value) => value;
  const x = (step) => (100 * (step - first)) / Math.max(1, last - first);
  const y = (value) => 100 - (100 * (on(value) - on(low))) / (on(high) - on(low));
  const plot = svg("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img", "aria-label": label });
  const labels = [];
  for (const value of ticks(low, high, log)) {
    plot.append(svg("path", { class: "grid", d: `M0 ${y(value)}H100` }));
    labels.push(html("span", { class: "y", style: `top: ${y(value)}%` }, magnitude(value)));
  }
  for (const { kind, raw } of series) if (raw) plot.append(svg("path", { class: `line raw ${kind}`, d: pathOf(steps, raw, x, y) }));
  for (const { kind, values } of series) plot.append(svg("path", { class: `line ${kind}`, d: pathOf(steps, values, x, y) }));
  box.append(plot, ...labels, ...names({ steps, series }, x, y, box.clientHeight), ...stepLabels(first, last));
  followPointer(box, plot, { steps, series }, x);
}
