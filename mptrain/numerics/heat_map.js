"use strict";

// The heat map: three panels, outputs, activation gradients and weight gradients, with a row for each histogram and a column
// for each power of two. One SVG unit is a column wide and a CSS pixel high, so that the loss scale 2^k moves a panel's cells
// by translating them k units. Cells of one colour are one path; each zone of float16 shows all paths through a window of its
// own, in its own hue, so that a cell that is moved from one zone into the next changes its hue.

const LINE = data.layers.length > 40 ? 16 : 20; // pixels, a row
const GAP = 5; // between layers
const LABEL = 18; // a row's name above it, where the screen is too narrow for a column of names
const LEVELS = [0.2, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0001]; // least share of the strongest colour, the next, ...

const [LOW, HIGH] = data.columns;
const LOST = data.subnormal - 1; // bins below this round to zero; this one rounds up to the smallest subnormal
const OVERFLOW = 16; // from this bin on values become infinite
const ZEROS = LOW - 3; // where the columns of exact zeros and of non-finite values begin, two units wide each
const NONFINITE = HIGH + 2;
const LEFT = ZEROS - 0.5;
const WIDTH = NONFINITE + 2.5 - LEFT;
const ZONES = [
  ["danger", LOW, LOST],
  ["subnormal", LOST, data.normal],
  ["normal", data.normal, OVERFLOW],
  ["danger", OVERFLOW, HIGH + 1],
];
const NARROW = matchMedia("(max-width: 900px)");

function level(share) {
  const found = LEVELS.findIndex((least) => share >= least);
  return 8 - (found < 0 ? LEVELS.length : found);
}

// Where each row of a kind stands: [{row, layer, y, height}], and the panel's height. On wide screens a layer is as high in all
// panels as it has variables, so that its rows stand side by side.
function arrange(kind, narrow) {
  const placed = [];
  let y = 0;
  for (const layer of data.layers) {
    const rows = layer.rows[kind];
    const lines = Math.max(1, layer.rows.weights.length);
    rows.forEach((row, i) => {
      const height = narrow || kind === "weights" ? LINE : lines * LINE;
      const top = narrow ? y + i * (LABEL + LINE + GAP) + LABEL : y + i * LINE;
      placed.push({ row, layer, kind, y: top, height: height - 1 });
    });
    y += narrow ? rows.length * (LABEL + LINE + GAP) : lines * LINE + GAP;
  }
  return { placed, height: y };
}

function rectangle(x, y, width, height) {
  return `M${x} ${y}h${width}v${height}h${-width}z`;
}

function paths(byLevel) {
  return byLevel.map((parts, i) => svg("path", { class: `l${i}`, d: parts.join("") })).filter((path) => path.getAttribute("d"));
}

function cells(placed) {
  const byLevel = Array.from({ length: 9 }, () => []);
  for (const { row, y, height } of placed) {
    row.counts.forEach((count, i) => {
      if (count) byLevel[level(count / row.count)].push(rectangle(row.first + i, y, 1, height));
    });
  }
  return paths(byLevel);
}

function atEnds(placed, share, x) {
  const byLevel = Array.from({ length: 9 }, () => []);
  for (const { row, y, height } of placed) if (row[share]) byLevel[level(row[share])].push(rectangle(x, y, 2, height));
  return paths(byLevel);
}

function draw(kind, placed, height) {
  const picture = svg("svg", {
    viewBox: `${LEFT} 0 ${WIDTH} ${height}`,
    preserveAspectRatio: "none",
    "shape-rendering": "crispEdges",
    "aria-hidden": "true",
  });
  const all = svg("g", { id: `cells-${kind}` }, ...cells(placed));
  const definitions = svg("defs", {}, all);
  picture.append(definitions);
  ZONES.forEach(([hue, from, to], i) => {
    const id = `zone-${kind}-${i}`;
    definitions.append(svg("clipPath", { id }, svg("rect", { x: from, y: 0, width: to - from, height })));
    const moving = svg("g", { class: "moving" }, svg("use", { href: `#cells-${kind}` }));
    const ground = svg("rect", { x: from, y: 0, width: to - from, height, fill: "var(--zone)" });
    picture.append(svg("g", { class: hue, "clip-path": `url(#${id})` }, ground, moving));
  });
  for (const x of [LOST, data.normal, OVERFLOW]) picture.append(svg("path", { class: "edge", d: `M${x} 0V${height}` }));
  picture.append(svg("g", { class: "zeros" }, ...atEnds(placed, "zero", ZEROS)));
  picture.append(svg("g", { class: "danger" }, ...atEnds(placed, "nonfinite", NONFINITE)));
  picture.append(svg("path", { class: "beyond" }));
  return picture;
}

function axis() {
  const powers = [LOST, data.normal, 0, OVERFLOW].map((x) => [x, powerOfTwo(x)]);
  const marks = [[ZEROS + 1, "0"], ...powers, [NONFINITE + 1, "∞"]];
  return marks.map(([x, text]) => html("span", { style: `left: ${(100 * (x - LEFT)) / WIDTH}%` }, text));
}

function fullName({ row, layer }) {
  return row.name ? `${layer.name}/${row.name}` : layer.name;
}

function line(place, narrow) {
  const name = html("span", { role: "rowheader", class: "name" }, narrow || !place.row.name ? fullName(place) : place.row.name);
  name.title = fullName(place);
  if (!narrow && place.kind !== "weights") name.className = "unseen";
  place.lost = html("span", { role: "cell", class: "lost" });
  place.over = html("span", { role: "cell", class: "over" });
  const style = `top: ${place.y}px; height: ${place.height}px; line-height: ${place.height}px`;
  return html("div", { role: "row", class: "row", style }, name, place.lost, place.over);
}

function panel(kind, narrow) {
  const { placed, height } = arrange(kind, narrow);
  const head = html("div", { class: "head", role: "row" }, html("h3", { role: "columnheader" }, data.kinds[kind]));
  head.append(html("div", { class: "axis", "aria-hidden": "true" }, ...axis()));
  head.append(html("span", { class: "lost", role: "columnheader" }, "lost %"));
  head.append(html("span", { class: "over", role: "columnheader" }, "over %"));
  const picture = draw(kind, placed, height);
  const body = html("div", { class: "body", role: "rowgroup", style: `height: ${height}px` }, picture);
  body.append(...placed.map((place) => line(place, narrow)));
  const attributes = { class: "panel", "data-kind": kind, role: "table", "aria-label": data.kinds[kind] };
  return { kind, placed, picture, element: html("div", attributes, head, body) };
}

function layerLabels() {
  const body = html("div", { class: "body" });
  let y = 0;
  for (const layer of data.layers) {
    const height = Math.max(1, layer.rows.weights.length) * LINE;
    const style = `top: ${y}px; line-height: ${height}px`;
    const other = layer.dtype === "float16" ? [] : [" ", html("small", { class: "quiet" }, layer.dtype)];
    body.append(html("div", { class: layer.atRisk ? "label risk" : "label", style, title: layer.name }, layer.name, ...other));
    y += height + GAP;
  }
  body.style.height = `${y}px`;
  // The labels themselves are placed, so they give the column no width: the longest one, unseen, does.
  const sizers = data.layers.map((layer) => layer.name + (layer.dtype === "float16" ? "" : ` ${layer.dtype}`));
  const longest = sizers.reduce((a, b) => (b.length > a.length ? b : a), "");
  const sizer = html("div", { class: "label sizer" }, longest);
  const head = html("div", { class: "head" }, html("h3", {}, "Layer"));
  return html("div", { class: "labels", "aria-hidden": "true" }, head, sizer, body);
}

let panels = [];

// Draws all panels anew, as after a turn of the phone.
function drawMap() {
  panels = collectedKinds().map((kind) => panel(kind, NARROW.matches));
  document.getElementById("map").replaceChildren(layerLabels(), ...panels.map(({ element }) => element));
  showChosen();
}

function showChosen() {
  const chosen = document.querySelector("#choose input:checked")?.value;
  for (const { kind, element } of panels) element.classList.toggle("chosen", kind === chosen);
}

function collectedKinds() {
  return Object.keys(data.kinds).filter((kind) => data.layers.some((layer) => layer.rows[kind].length));
}

function offerChoice() {
  const kinds = collectedKinds();
  for (const kind of kinds) {
    const input = html("input", { type: "radio", name: "kind", value: kind });
    input.checked = kind === (kinds.includes("gradient") ? "gradient" : kinds[0]);
    input.addEventListener("change", showChosen);
    document.getElementById("choose").append(html("label", {}, input, data.kinds[kind]));
  }
}

offerChoice();
drawMap();
