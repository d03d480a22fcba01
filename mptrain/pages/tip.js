"use strict";

// The box beside the pointer that says what is under it; a page has one, and its charts fill it.

const tip = html("div", { class: "tip", hidden: "" });
document.body.append(tip);

// Shows `lines`, elements and texts, beside the pointer; hides the box where there are none.
function showTip(event, lines) {
  tip.hidden = !lines;
  if (!lines) return;
  tip.replaceChildren(...lines);
  tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8))}px`;
  const below = event.clientY + 18;
  tip.style.top = `${below + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 10 : below}px`;
}

// Fills the box, from what `under(event)` returns, for as long as the pointer is on the element.
function tipOver(element, under) {
  element.addEventListener("pointermove", (event) => showTip(event, under(event)));
  element.addEventListener("pointerleave", () => showTip(null, null));
}
