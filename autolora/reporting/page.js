"use strict";
// Numbers sort as numbers: "81.2 ± 0.4" by 81.2, "1,234" by 1234; what is no number comes last, in alphabetical order.
const numberOf = (text) => {
  const found = text.replaceAll(",", "").match(/^-?\d+(\.\d+)?(e[+-]?\d+)?/i);
  return found ? parseFloat(found[0]) : NaN;
};
const compare = (a, b) => {
  const [x, y] = [numberOf(a), numberOf(b)];
  if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1;
  return Number.isNaN(x) ? a.localeCompare(b) : x - y;
};

for (const block of document.querySelectorAll(".table")) {
  const body = block.querySelector("tbody");
  const rows = [...body.rows];
  const heads = [...block.querySelectorAll("th")];
  const count = () => {
    const shown = rows.filter((row) => !row.hidden).length;
    block.querySelector(".count").textContent = `${shown} of ${rows.length} rows`;
  };
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].textContent.trim();
      rows.sort((a, b) => (key(a) === "") - (key(b) === "") || (down ? -1 : 1) * compare(key(a), key(b)));
      body.append(...rows);
    });
  });
  block.querySelector("input").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    count();
  });
  count();
  // A shade where columns are out of sight on the right: some browsers hide scrollbars until one scrolls.
  const box = block.querySelector(".scroll");
  const shade = () => box.classList.toggle("more", box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
  box.addEventListener("scroll", shade);
  const resized = new ResizeObserver(shade);
  resized.observe(box);
  resized.observe(body.parentElement);
}

// Configurations: what all runs share is stored once.
const { common, own } = JSON.parse(document.getElementById("configurations").textContent);
const dialog = document.getElementById("configuration");
const show = (row) => {
  const mine = own[row.dataset.run];
  const pre = dialog.querySelector("pre");
  dialog.querySelector("h3").textContent = row.cells[0].textContent;
  pre.replaceChildren();
  for (const key of [...new Set([...Object.keys(common), ...Object.keys(mine)])].sort()) {
    const line = document.createElement(key in mine ? "b" : "span");
    line.textContent = `${key}: ${JSON.stringify(key in mine ? mine[key] : common[key])}\n`;
    pre.append(line);
  }
  dialog.showModal();
};
for (const row of document.querySelectorAll("tr[data-run]")) {
  row.addEventListener("click", () => show(row));
  row.addEventListener("keydown", (event) => { if (event.key === "Enter") show(row); });
}

// What a mark says, at once and beside the pointer; without a script the browser shows the same after a while.
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);
for (const mark of document.querySelectorAll(".mark")) {
  const title = mark.querySelector("title");
  const text = title.textContent;
  title.remove();
  mark.setAttribute("aria-label", text);
  mark.addEventListener("pointermove", (event) => {
    tip.textContent = text;
    tip.hidden = false;
    tip.style.left = `${Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.max(event.clientY - tip.offsetHeight - 8, 4)}px`;
  });
  mark.addEventListener("pointerleave", () => { tip.hidden = true; });
}
