"use strict";

// Relative errors of gradients and weights: for each precision two maps, with a row for each layer in forward order and a column
// for each compared step. Blue is below the bound, red above it; a frame marks where the run parts.

const BELOW = [[1, "n6"], [0.3, "n4"], [0.1, "n3"], [0.03, "n2"], [0.01, "n1"]]; // of the bound: errors up to it, and colours
const ABOVE = [[3, "d4"], [10, "d5"], [Infinity, "d6"]];
const NOT_FINITE = "d8";
const KINDS = { gradients: "Gradients, at float32’s weights", weights: "Weights" };

function colour(error) {
  if (error === null) return NOT_FINITE;
  const share = error / data.bound;
  if (share > 1) return ABOVE.find(([most]) => share <= most)[1];
  return BELOW.findLast(([most]) => share <= most)[1];
}

function worstOf(errors) {
  return errors.reduce((worst, error) => (worst === null || error === null ? null : Math.max(worst, error)), 0);
}

function percentOf(error) {
  if (error === null) return "∞";
  const share = 100 * error;
  if (share > 0 && share < 0.01) return "<0.01 %";
  return share >= 1000 ? `${magnitude(share)} %` : `${Number(share.toPrecision(2))} %`;
}

// One layer's cells as one picture: a path for each colour.
function strip(errors, framed) {
  const paths = {};
  errors.forEach((error, i) => (paths[colour(error)] = `${paths[colour(error)] || ""}M${i} 0h1v1h-1z`));
  const attributes = { viewBox: `0 0 ${errors.length} 1`, preserveAspectRatio: "none", "aria-hidden": "true" };
  const picture = svg("svg", { ...attributes, "shape-rendering": "crispEdges" });
  for (const [name, d] of Object.entries(paths)) picture.append(svg("path", { d, style: `fill: var(--${name})` }));
  const frames = framed === null ? [] : ["halo", "frame"];
  picture.append(...frames.map((name) => svg("path", { class: name, d: `M${framed} 0h1v1h-1z` })));
  return picture;
}

function axisOf(steps) {
  const labels = [[0, "first"], [steps.length - 1, "last"]].map(([i, side]) => {
    return html("span", { class: side }, `${side === "first" ? "step " : ""}${steps[i].toLocaleString("en")}`);
  });
  return html("div", { class: "steps", "aria-hidden": "true" }, ...labels);
}

function tipOfStrip(picture, layer, errors) {
  tipOver(picture, (event) => {
    const { left, width } = picture.getBoundingClientRect();
    const i = Math.min(errors.length - 1, Math.max(0, Math.floor((errors.length * (event.clientX - left)) / width)));
    const what = errors[i] === null ? "not finite" : `${magnitude(errors[i])} relative`;
    return [html("strong", {}, layer), html("div", {}, `step ${data.compared[i].toLocaleString("en")}: ${what}`)];
  });
}

function row(layer, errors, framed) {
  if (errors === null) {
    const name = html("span", { class: "layer", role: "rowheader", title: layer }, layer);
    return html("div", { class: "row", role: "row" }, name, html("span", { class: "quiet", role: "cell" }, "not seen"));
  }
  const picture = strip(errors, framed);
  tipOfStrip(picture, layer, errors);
  const worst = worstOf(errors);
  const much = worst === null || worst > data.bound;
  const name = html("span", { class: "layer", role: "rowheader", title: layer }, layer);
  return html("div", { class: "row", role: "row" }, name, picture,
    html("span", { class: much ? "worst bad" : "worst", role: "cell" }, percentOf(worst)));
}

function errorMap(kind, rows, place) {
  const head = html("div", { class: "row head", role: "row" }, html("span", { role: "columnheader" }, KINDS[kind]),
    html("span", { class: "worst", role: "columnheader" }, "worst"));
  const lines = rows.map((errors, i) => row(data.layers[i], errors, place && place[0] === i ? place[1] : null));
  const foot = html("div", { class: "row" }, html("span", { class: "layer" }), axisOf(data.compared), html("span"));
  const attributes = { class: "errors", role: "table", tabindex: "0", "data-kind": kind, "aria-label": KINDS[kind] };
  return html("div", attributes, head, ...lines, foot);
}

function drawKey(box) {
  const cell = (name, text) => html("span", {}, html("i", { style: `background: var(--${name})` }), text);
  const below = [...BELOW].reverse().map(([most, name]) => cell(name, most === 1 ? "" : percentOf(most * data.bound)));
  below[0].lastChild.data = `up to ${below[0].lastChild.data}`;
  const above = ABOVE.map(([most, name]) => cell(name, most === Infinity ? "" : percentOf(most * data.bound)));
  const bound = html("b", {}, `bound ${percentOf(data.bound)}`);
  box.append(...below, bound, ...above, cell(NOT_FINITE, "not finite"), html("span", {}, html("i", { class: "frame" }), "first past it"));
}

const mapOf = Object.fromEntries(data.maps.map((map) => [map.precision, map]));
document.querySelectorAll(".pair").forEach((pair) => {
  const { gradients, weights, parting, drift } = mapOf[pair.dataset.precision];
  pair.append(errorMap("gradients", gradients, parting), errorMap("weights", weights, drift));
  for (const map of pair.children) {
    const framed = map.querySelector(".row:has(.frame)");
    if (framed) map.scrollTop = framed.offsetTop - map.clientHeight / 2; // where there are more layers than it shows at once
  }
});
const key = document.getElementById("key");
if (key) drawKey(key);
