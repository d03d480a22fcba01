"use strict";

// The slider of the loss scale: moves the gradients' histograms and says what float16 would lose at that scale. A scale of 2^k
// adds k to every value's exponent, so the shares at any scale follow from the true values' histogram alone.

const LEAST_WORTH_NAMING = 0.01; // a row of which more than this share is lost is counted in the sentence

// The share of a row's values whose exponents lie from `from` up to, and without, `to`, at the scale 2^k.
function shareBetween(row, from, to, k) {
  let sum = 0;
  row.counts.forEach((count, i) => {
    const exponent = row.first + i + k;
    if (exponent >= from && exponent < to) sum += count;
  });
  return row.count ? sum / row.count : 0;
}

function showShare(element, share, much) {
  element.textContent = percent(share);
  element.classList.toggle("nil", share === 0);
  element.classList.toggle("much", share >= much);
}

// Marks at a row's ends that some of it lies beyond the columns shown.
function beyond(placed, k) {
  let marks = "";
  for (const { row, y, height } of placed) {
    const middle = y + height / 2;
    if (shareBetween(row, -Infinity, LOW, k) > 0.001) marks += `M${LOW - 0.9} ${middle}l.7 -5v10z`;
    if (shareBetween(row, HIGH + 1, Infinity, k) > 0.001) marks += `M${HIGH + 1.9} ${middle}l-.7 -5v10z`;
  }
  return marks;
}

function moveTo(k) {
  for (const { kind, placed, picture } of panels) {
    const shift = kind === "output" ? 0 : k;
    for (const group of picture.querySelectorAll(".moving")) group.style.transform = `translateX(${shift}px)`;
    picture.querySelector(".beyond").setAttribute("d", beyond(placed, shift));
    for (const place of placed) {
      const rounded = place.layer.dtype !== "float32";
      showShare(place.lost, shareBetween(place.row, -Infinity, LOST, shift), rounded ? LEAST_WORTH_NAMING : Infinity);
      showShare(place.over, shareBetween(place.row, OVERFLOW, Infinity, shift), rounded ? Number.MIN_VALUE : Infinity);
    }
  }
}

// What the scale does, in one sentence. Layers that compute in float32 are left out: their gradients are not rounded.
function sentence(k) {
  const rows = data.layers.filter((layer) => layer.dtype !== "float32")
    .flatMap((layer) => [...layer.rows.gradient, ...layer.rows.weights]);
  const over = rows.filter((row) => shareBetween(row, OVERFLOW, Infinity, k) > 0).length;
  const lost = rows.filter((row) => shareBetween(row, -Infinity, LOST, k) >= LEAST_WORTH_NAMING).length;
  const of = (count) => `${count} of ${rows.length} gradients`;
  const first = over ? `${of(over)} overflow${over === 1 ? "s" : ""}: steps are skipped.` : "No gradient overflows.";
  const second = lost ? `${of(lost)} lose${lost === 1 ? "s" : ""} 1 % or more of the values.` : "None loses 1 % of its values.";
  return `${first} ${second}`;
}

function showScale(k) {
  const scale = (2 ** k).toLocaleString("en");
  document.getElementById("loss-scale").setAttribute("aria-valuetext", `2 to the power of ${k}, ${scale}`);
  document.getElementById("scale-value").textContent = `${powerOfTwo(k)} = ${scale}`;
  document.getElementById("scale-says").textContent = sentence(k);
  moveTo(k);
}

function drawMarks() {
  const marks = document.getElementById("scale-marks");
  const at = (k) => `left: ${(100 * k) / 24}%`;
  if (data.recommended) {
    const [from, to] = data.recommended;
    const style = `${at(from)}; width: ${(100 * (to - from)) / 24}%`;
    marks.append(html("span", { class: "band", style }, html("span", { class: to - from >= 6 ? "" : "beside" }, "recommended")));
  }
  marks.classList.toggle("bare", !data.recommended);
  for (let k = 0; k <= 24; k += 4) marks.append(html("span", { style: at(k) }, powerOfTwo(k)));
}

function startSlider(slider) {
  const set = (k) => {
    slider.value = k;
    showScale(k);
  };
  slider.addEventListener("input", () => showScale(Number(slider.value)));
  document.querySelectorAll("#scale [data-scale]").forEach((button) => {
    const middle = data.recommended && Math.floor((data.recommended[0] + data.recommended[1]) / 2);
    button.addEventListener("click", () => set(button.dataset.scale === "run" ? data.exponent : middle));
  });
  NARROW.addEventListener("change", () => {
    drawMap();
    showScale(Number(slider.value));
  });
  drawMarks();
  set(data.exponent);
}

function startWithoutSlider() {
  NARROW.addEventListener("change", () => {
    drawMap();
    moveTo(0);
  });
  moveTo(0);
}

const slider = document.getElementById("loss-scale");
if (slider) startSlider(slider);
else startWithoutSlider();
