"use strict";

// The loss scale over the steps, on a scale of powers of two, with the recommended range behind it, where there is one, and
// below it a tick wherever steps were skipped. Needs tip.js.
//
// drawScaleHistory(box, { steps, scales, recommended, skipped }) fills a box of class "plot": `steps` are the first and the last,
// `scales` pairs (step, scale) wherever it changed, `recommended` two exponents or null, `skipped` triples (from step, to step,
// how many).

function drawScaleHistory(box, { steps: [first, last], scales, recommended, skipped }) {
  const powers = scales.map(([, scale]) => Math.log2(scale));
  const shown = [...powers, ...(recommended || [])];
  const low = Math.floor(shown.reduce((a, b) => Math.min(a, b))) - 2;
  const high = Math.ceil(shown.reduce((a, b) => Math.max(a, b))) + 1;
  const x = (step) => (100 * (step - first)) / Math.max(1, last - first);
  const y = (exponent) => 100 - (100 * (exponent - low)) / (high - low);

  const named = { role: "img", "aria-label": "Loss scale over the steps" };
  const plot = svg("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", ...named });
  const labels = [];
  if (recommended) {
    const [from, to] = recommended;
    plot.append(svg("rect", { class: "band", x: 0, width: 100, y: y(to), height: y(from) - y(to) }));
    labels.push(html("span", { style: `top: ${y(to)}%; right: 6px` }, "recommended"));
  }
  const every = Math.ceil((high - low) / 6);
  for (let k = low; k <= high; k += every) {
    plot.append(svg("path", { class: "grid", d: `M0 ${y(k)}H100` }));
    labels.push(html("span", { class: "y", style: `top: ${y(k)}%` }, powerOfTwo(k)));
  }
  let line = "";
  scales.forEach(([step], i) => (line += i ? `H${x(step)}V${y(powers[i])}` : `M0 ${y(powers[i])}`)); // before it was first known it was the same
  plot.append(svg("path", { class: "line", d: `${line}H100` }));
  for (const [from, to] of skipped) plot.append(svg("path", { class: "mark", d: `M${x((from + to) / 2)} 100v-7` }));
  if (skipped.length) labels.push(html("span", { style: "bottom: 8%; left: 6px" }, "skipped steps"));

  for (const [step, side] of [[first, "first"], [Math.round((first + last) / 2), ""], [last, "last"]]) {
    const text = side === "first" ? `step ${step.toLocaleString("en")}` : step.toLocaleString("en");
    labels.push(html("span", { class: `x ${side}`, style: `left: ${x(step)}%` }, text));
  }
  box.append(plot, ...labels);

  tipOver(box, (event) => {
    const { left, width } = plot.getBoundingClientRect();
    const at = Math.min(last, Math.max(first, Math.round(first + ((last - first) * (event.clientX - left)) / width)));
    const known = scales.findLast(([step]) => step <= at) || scales[0];
    const near = skipped.filter(([from, to]) => Math.abs(x((from + to) / 2) - x(at)) * width < 400); // 4 pixels
    const lines = [html("strong", {}, `step ${at.toLocaleString("en")}`), html("div", {}, `loss scale ${known[1].toLocaleString("en")}`)];
    for (const [from, to, count] of near.slice(0, 4)) {
      const where = from === to ? `step ${from.toLocaleString("en")}` : `steps ${from.toLocaleString("en")} to ${to.toLocaleString("en")}`;
      lines.push(html("div", { class: "bad" }, `${count.toLocaleString("en")} skipped: ${where}`));
    }
    return lines;
  });
}
