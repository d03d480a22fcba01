"use strict";

// The loss scale over the steps, on a scale of powers of two, with the recommended range behind it and a tick for each skipped
// step below it.

function drawHistory(box) {
  const [first, last] = data.steps;
  const powers = data.history.map(([, scale]) => Math.log2(scale));
  const shown = [...powers, ...(data.recommended || [])];
  const low = Math.floor(Math.min(...shown)) - 2;
  const high = Math.ceil(Math.max(...shown)) + 1;
  const x = (step) => (100 * (step - first)) / Math.max(1, last - first);
  const y = (exponent) => 100 - (100 * (exponent - low)) / (high - low);

  const named = { role: "img", "aria-label": "Loss scale over the steps" };
  const plot = svg("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", ...named });
  const labels = [];
  if (data.recommended) {
    const [from, to] = data.recommended;
    plot.append(svg("rect", { class: "band", x: 0, width: 100, y: y(to), height: y(from) - y(to) }));
    labels.push(html("span", { style: `top: ${y(to)}%; right: 6px` }, "recommended"));
  }
  const every = Math.ceil((high - low) / 6);
  for (let k = low; k <= high; k += every) {
    plot.append(svg("path", { class: "grid", d: `M0 ${y(k)}H100` }));
    labels.push(html("span", { class: "y", style: `top: ${y(k)}%` }, powerOfTwo(k)));
  }
  let line = "";
  data.history.forEach(([step], i) => (line += i ? `H${x(step)}V${y(powers[i])}` : `M${x(step)} ${y(powers[i])}`));
  plot.append(svg("path", { class: "line", d: `${line}H100` }));
  for (const step of data.skipped) plot.append(svg("path", { class: "mark", d: `M${x(step)} 100v-7` }));
  if (data.skipped.length) labels.push(html("span", { style: "bottom: 8%; left: 6px" }, "skipped steps"));

  for (const [step, side] of [[first, "first"], [Math.round((first + last) / 2), ""], [last, "last"]]) {
    const text = side === "first" ? `step ${step.toLocaleString("en")}` : step.toLocaleString("en");
    labels.push(html("span", { class: `x ${side}`, style: `left: ${x(step)}%` }, text));
  }
  box.append(plot, ...labels);
}

drawHistory(document.getElementById("history"));
