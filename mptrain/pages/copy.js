"use strict";

// Buttons with data-copy, the id of the element whose text they copy. The clipboard may be closed to a page that is opened from
// disk; then the older command is tried, and where that is refused too the text is left selected for the user's own keys.

function select(element) {
  const range = document.createRange();
  range.selectNodeContents(element);
  const selection = getSelection();
  selection.removeAllRanges();
  selection.addRange(range);
}

async function copyText(element) {
  try {
    await navigator.clipboard.writeText(element.textContent);
    return "Copied";
  } catch {
    select(element);
    return document.execCommand("copy") ? "Copied" : "Selected: press Ctrl+C";
  }
}

document.querySelectorAll("[data-copy]").forEach((button) => {
  const name = button.textContent;
  button.addEventListener("click", async () => {
    button.textContent = await copyText(document.getElementById(button.dataset.copy));
    setTimeout(() => (button.textContent = name), 2000);
  });
});
