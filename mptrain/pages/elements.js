"use strict";

// What every page's scripts begin with: the page's data, making elements, and numbers as mptrain/pages/numbers.py writes them.

const data = JSON.parse(document.getElementById("data").textContent);

function html(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function percent(share) {
  if (share === null) return "–";
  if (share === 0 || share === 1) return String(100 * share);
  if (share < 0.0005) return "<0.1";
  const tenths = Math.floor(1000 * share + 0.5);
  return tenths === 1000 ? ">99.9" : (tenths / 10).toFixed(1);
}

function powerOfTwo(exponent) {
  return "2" + String(exponent).replace(/./g, (sign) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(sign)]);
}
