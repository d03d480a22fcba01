"use strict";

// Curves over the steps, several in one plot, each named at its right end. Needs tip.js.
//
// drawCurves(box, { steps, series, log, label, zero, marks, unit }) fills a box of class "plot curves". Of each series: `name`,
// or "" of one that needs none; `kind`, a class that gives the colour ("reference", "series-1", ...); `values`, one for each step,
// null where there is none; `raw`, which is drawn faintly behind them, or nothing; `steps`, where they are not the plot's, of
// which the first and the last are its ends then; and `dots`, whether each value is marked. On a logarithmic axis all values
// must be above 0; `zero`: another one begins at 0. `marks` are ticks below the curves, as [step, what the pointer is told];
// `unit` is what a raw value is of, a "step" if nothing is said.

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
function range(series, log, zero) {
  const shown = series.flatMap(({ values, raw }) => [...values, ...(raw || [])]).filter((value) => value !== null);
  if (!shown.length) return log ? [0.1, 1] : [0, 1];
  let [low, high] = [shown.reduce((a, b) => Math.min(a, b)), shown.reduce((a, b) => Math.max(a, b))];
  if (zero) [low, high] = [0, high || 1];
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const room = log ? (high / low) ** 0.04 : 0.04 * (high - low);
  return log ? [low / room, high * room] : [zero ? 0 : low - room, high + room];
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

function dotsOf(steps, values, x, y) {
  return values.map((value, i) => (value === null ? "" : `M${x(steps[i]).toFixed(2)} ${y(value).toFixed(2)}h0`)).join("");
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

function stepsOf(plot, one) {
  return one.steps || plot.steps;
}

// Each name beside the end of its curve, which is the plot's but for a run that has no values from some step on.
function names(plot, x, y, height) {
  const series = plot.series.filter(({ name }) => name);
  const ends = series.map(({ values }) => values.findLastIndex((value) => value !== null));
  const lasts = series.map(({ values }, i) => values[ends[i]]);
  const tops = spread(lasts.map((last) => (last === undefined ? height : (y(last) / 100) * height)), height);
  return series.map(({ name, kind }, i) => {
    const text = lasts[i] === undefined ? `${name} –` : name;
    const left = lasts[i] === undefined ? 100 : x(stepsOf(plot, series[i])[ends[i]]);
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

// The place of the step that is nearest to where the pointer is, in percent of the plot's width.
function nearest(steps, x, at) {
  return steps.reduce((best, step, i) => (Math.abs(x(step) - at) < Math.abs(x(steps[best]) - at) ? i : best), 0);
}

// What is under the pointer: the step nearest to it, each series' value there or nearest to it, and the marks beside it.
function followPointer(box, picture, plot, x) {
  const cursor = svg("path", { class: "cursor" });
  picture.append(cursor);
  tipOver(box, (event) => {
    const { left, width } = picture.getBoundingClientRect();
    const at = (100 * (event.clientX - left)) / width;
    const places = plot.series.map((one) => nearest(stepsOf(plot, one), x, at));
    const found = plot.series.map((one, i) => stepsOf(plot, one)[places[i]]);
    const step = found[nearest(found, x, at)];
    cursor.setAttribute("d", `M${x(step)} 0V100`);
    const lines = plot.series.map(({ name, values, raw }, i) => {
      const own = raw ? `, ${magnitude(raw[places[i]])} in this ${plot.unit}` : "";
      const where = found[i] === step ? "" : `, at step ${found[i].toLocaleString("en")}`;
      return html("div", {}, `${name} ${magnitude(values[places[i]])}${own}${where}`.trim());
    });
    const near = (plot.marks || []).filter(([marked]) => (Math.abs(x(marked) - at) * width) / 100 < 4);
    const told = near.slice(0, 3).map(([, text]) => html("div", { class: "bad" }, text));
    return [html("strong", {}, `step ${step.toLocaleString("en")}`), ...lines, ...told];
  });
  box.addEventListener("pointerleave", () => cursor.removeAttribute("d"));
}

function drawCurves(box, { steps, series, log, label, zero = false, marks = [], unit = "step" }) {
  const all = { steps, series, marks, unit };
  const [low, high] = range(series, log, zero);
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
  for (const { kind, raw, steps: own } of series) if (raw) plot.append(svg("path", { class: `line raw ${kind}`, d: pathOf(own || steps, raw, x, y) }));
  for (const { kind, values, steps: own, dots } of series) {
    plot.append(svg("path", { class: `line ${kind}`, d: pathOf(own || steps, values, x, y) }));
    if (dots) plot.append(svg("path", { class: `line dots ${kind}`, d: dotsOf(own || steps, values, x, y) }));
  }
  for (const [step] of marks) plot.append(svg("path", { class: "mark", d: `M${x(step)} 100v-7` }));
  box.append(plot, ...labels, ...names(all, x, y, box.clientHeight), ...stepLabels(first, last));
  followPointer(box, plot, all, x);
}
