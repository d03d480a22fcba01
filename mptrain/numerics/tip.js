"use strict";

// What is under the pointer on the heat map: the row's name, the power of two, and the share of the values there.

function under(event, { kind, placed, picture }) {
  const box = picture.getBoundingClientRect();
  const x = Math.floor(LEFT + ((event.clientX - box.left) / box.width) * WIDTH);
  const y = event.clientY - box.top;
  const place = placed.find((one) => y >= one.y && y <= one.y + one.height);
  if (!place || x < LOW || x > HIGH) return null;
  const k = kind === "output" || !slider ? 0 : Number(slider.value);
  const { row } = place;
  const share = (row.counts[x - k - row.first] || 0) / row.count;
  return [
    html("strong", {}, fullName(place)),
    html("br"),
    `${percent(share)} % from ${powerOfTwo(x)} to ${powerOfTwo(x + 1)}`,
    html("br"),
    `In the run: ${percent(row.zero)} % zeros, ${percent(row.nonfinite)} % non-finite`,
  ];
}

tipOver(document.getElementById("map"), (event) => {
  const found = panels.find(({ element }) => element.contains(event.target));
  return found && under(event, found);
});
