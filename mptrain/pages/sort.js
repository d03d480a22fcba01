"use strict";

// Tables of class "sortable": a click on a column's head sorts by it, a second click turns the order round. A cell is compared
// by its data-value, as a number where it is one; an empty value stays last in both orders, because it says "not known". A
// table with data-first shows that many rows until asked for all.

function cellValue(row, column) {
  const value = row.cells[column].dataset.value;
  return value === "" || isNaN(value) ? value : Number(value);
}

function compareRows(column, sign) {
  return (left, right) => {
    const [a, b] = [cellValue(left, column), cellValue(right, column)];
    if (a === "" || b === "") return (a === "") - (b === "");
    return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  };
}

function sortBy(table, column) {
  const heads = [...table.tHead.rows[0].cells];
  const head = heads[column];
  const first = head.dataset.first || "descending";
  const order = { ascending: "descending", descending: "ascending" }[head.getAttribute("aria-sort")] || first;
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", order);
  const body = table.tBodies[0];
  body.append(...[...body.rows].sort(compareRows(column, order === "ascending" ? 1 : -1)));
}

function makeSortable(table) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => sortBy(table, column));
  });
  const more = document.querySelector(`[data-all-of="${table.id}"]`);
  if (!more) return;
  table.classList.add("cut");
  more.hidden = false;
  more.addEventListener("click", () => {
    table.classList.remove("cut");
    more.hidden = true;
  });
}

document.querySelectorAll("table.sortable").forEach(makeSortable);
