"use strict";
const table = document.querySelector("table");
const headers = [...table.tHead.rows[0].cells];
const images = [...table.tBodies];
const byText = new Intl.Collator("en", { numeric: true }).compare;

// numbers are in data-value, as they are before they are rounded
function value(image, column) {
  const cell = image.rows[0].cells[column];
  return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
}

function sort(column) {
  const header = headers[column];
  const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of headers) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const compare = (a, b) => (typeof a === "number" ? a - b : byText(a, b));
  images.sort((a, b) => sign * compare(value(a, column), value(b, column)));
  table.append(...images);
}

function filter() {
  const name = document.getElementById("name").value.toLowerCase();
  const kind = document.getElementById("kind").value;
  let shown = 0;
  for (const image of images) {
    const cell = image.rows[0].cells[0];
    image.hidden =
      !cell.textContent.toLowerCase().includes(name) ||
      (kind !== "" && image.className !== kind);
    shown += !image.hidden;
  }
  document.getElementById("shown").value = shown + " of " + images.length + " images";
}

// to a browser that runs scripts, what is in <noscript> is text: no picture is read
// before its row is opened
function toggle(button) {
  const row = document.getElementById(button.getAttribute("aria-controls"));
  const still = row.querySelector("noscript");
  if (still) still.parentElement.innerHTML = still.textContent;
  row.hidden = !row.hidden;
  button.setAttribute("aria-expanded", !row.hidden);
}

headers.forEach((header, column) => {
  header.firstElementChild.addEventListener("click", () => sort(column));
});
table.addEventListener("click", (event) => {
  const button = event.target.closest("tbody button");
  if (button) toggle(button);
});
document.getElementById("name").addEventListener("input", filter);
document.getElementById("kind").addEventListener("input", filter);
filter();
