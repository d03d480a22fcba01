"use strict";

// Parallel coordinates of the trials: lines over axes, of which ranges can be kept, and the trial under the pointer. Needs tip.js.

const box = document.getElementById("parallel");
const picture = svg("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img", "aria-label": "Parallel coordinates" });
const spacing = 100 / Math.max(1, data.axes.length - 1);
const ranges = data.axes.map(() => null); // of each axis the kept places, low and high

// A line that leaves each axis level, so that lines which meet on one can be told apart behind it.
function pathThrough(places) {
  const known = places.filter((place) => place !== null);
  const points = known.map((place, i) => [i * spacing, 100 - 100 * place]);
  const half = spacing / 2;
  const bends = points.slice(1).map(([x, y], i) => `C${points[i][0] + half} ${points[i][1]} ${x - half} ${y} ${x} ${y}`);
  return points.length ? `M${points[0].join(" ")}${bends.join("")}` : "";
}

function lineOf({ places, rank }) {
  const kind = rank === null ? "failed" : rank === 0 ? "best" : "";
  const colour = rank === null ? "" : `stroke: var(--n${8 - Math.round(6 * rank)})`;
  return svg("path", { d: pathThrough(places), class: kind, style: colour });
}

const paths = data.lines.map(lineOf);
picture.append(...[...paths].reverse()); // the best on top
box.append(picture);

const rows = new Map([...document.querySelectorAll("#trials [data-trial]")].map((row) => [Number(row.dataset.trial), row]));

function isKept({ places }) {
  return ranges.every((range, i) => !range || (places[i] !== null && places[i] >= range[0] && places[i] <= range[1]));
}

function showKept() {
  let count = 0;
  data.lines.forEach((line, i) => {
    const kept = isKept(line);
    count += kept;
    paths[i].classList.toggle("gone", !kept);
    rows.get(line.number).classList.toggle("gone", !kept);
  });
  const all = ranges.every((range) => !range);
  document.getElementById("kept").textContent = all ? "" : `${count} of ${data.lines.length} trials kept; a click on an axis frees it.`;
}

// Marks a trial, and no other, in lines and table.
function choose(chosen) {
  data.lines.forEach((line, i) => {
    paths[i].classList.toggle("chosen", line === chosen);
    rows.get(line.number).classList.toggle("chosen", line === chosen);
  });
}

function lines(line) {
  const values = data.axes.map(({ name }, i) => html("div", {}, `${name} ${line.texts[i]}`));
  const failed = line.status === "finished" ? [] : [html("div", {}, line.status)];
  return [html("strong", {}, `trial ${line.number}`), ...values, ...failed];
}

// The line nearest to the pointer, if one is near: in pixels, above or below it.
function under(event) {
  const { left, top, width, height } = picture.getBoundingClientRect();
  const at = Math.max(0, Math.min((100 * (event.clientX - left)) / width / spacing, data.axes.length - 1));
  const first = Math.min(Math.floor(at), Math.max(0, data.axes.length - 2));
  const bend = (at - first) ** 2 * (3 - 2 * (at - first));
  let [nearest, least] = [null, 14];
  for (const line of data.lines.filter(isKept)) {
    const [a, b] = [line.places[first], line.places[first + 1] ?? line.places[first]];
    if (a === null || (line.places[first + 1] === null && at - first > 0.1)) continue;
    const distance = Math.abs(event.clientY - top - height * (1 - a - (b - a) * bend));
    if (distance < least) [nearest, least] = [line, distance];
  }
  choose(nearest);
  return nearest && lines(nearest);
}

tipOver(box, under);
box.addEventListener("pointerleave", () => choose(null));
rows.forEach((row, number) => {
  const line = data.lines.find((each) => each.number === number);
  for (const name of ["pointerenter", "focus"]) row.addEventListener(name, () => choose(line));
  for (const name of ["pointerleave", "blur"]) row.addEventListener(name, () => choose(null));
});

// An axis: its name, its labels, and the handle along which a range is dragged.
data.axes.forEach(({ name, labels }, i) => {
  const left = `${i * spacing}%`;
  const handle = html("div", { class: "axis", style: `left: ${left}` });
  const mark = html("div", { class: "kept", hidden: "" });
  handle.append(mark);
  box.append(handle, html("span", { class: i % 2 ? "name odd" : "name", style: `left: ${left}` }, name));
  for (const [place, text] of labels) {
    box.append(html("span", { class: "label", style: `left: ${left}; top: ${100 - 100 * place}%` }, text));
  }
  const placeOf = (event) => {
    const { top, height } = picture.getBoundingClientRect();
    return 1 - (event.clientY - top) / height;
  };
  let start = null;
  handle.addEventListener("pointerdown", (event) => {
    handle.setPointerCapture(event.pointerId);
    start = placeOf(event);
    ranges[i] = null;
    mark.hidden = true;
    showKept();
  });
  handle.addEventListener("pointermove", (event) => {
    if (start === null || Math.abs(placeOf(event) - start) < 0.01) return;
    const [low, high] = [start, placeOf(event)].sort((a, b) => a - b);
    ranges[i] = [low - 0.005, high + 0.005];
    mark.hidden = false;
    mark.style.top = `calc(8px + ${1 - Math.min(high, 1.02)} * (100% - 16px))`;
    mark.style.height = `calc(${Math.min(high, 1.02) - Math.max(low, -0.02)} * (100% - 16px))`;
    showKept();
  });
  for (const end of ["pointerup", "pointercancel"]) handle.addEventListener(end, () => (start = null));
});
