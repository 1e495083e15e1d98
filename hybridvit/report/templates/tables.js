// Every table can be sorted by its headings, and a longer one filtered. Without this script they
// are plain tables.
"use strict";
(function () {
  const FILTERED_FROM = 8; // rows
  const UNITS = { k: 1e3, M: 1e6, G: 1e9 };
  const MISSING = "–";
  const words = new Intl.Collator("en", { numeric: true });

  // The first number of "85.2 ± 0.4", "[-1.3, 2]", "1,234" or "1.2 M"; none of other text.
  function number(text) {
    const found = text.replace(/,(?=\d{3})/g, "").match(/([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?) ?([kMG]\b)?/);
    return found ? Number(found[1]) * (UNITS[found[2]] || 1) : null;
  }

  function text(row, column) {
    const found = row.cells[column].textContent.trim();
    return found === MISSING ? null : found;
  }

  // Rows in the order of a column, those without a value last either way.
  function sorted(rows, column, isNumeric, way) {
    const value = isNumeric ? (found) => number(found) : (found) => found;
    const compare = isNumeric ? (a, b) => a - b : words.compare;
    const keyed = rows.map(function (row) {
      const found = text(row, column);
      return { row, key: found === null ? null : value(found) };
    });
    keyed.sort(function (a, b) {
      if (a.key === null || b.key === null) return (a.key === null) - (b.key === null);
      return way * compare(a.key, b.key);
    });
    return keyed.map((item) => item.row);
  }

  function sortable(table, rows) {
    const body = table.tBodies[0];
    const headings = Array.from(table.tHead.rows[0].cells);
    headings.forEach(function (heading, column) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", function () {
        const next = { none: "ascending", ascending: "descending" };
        const way = next[heading.getAttribute("aria-sort") || "none"]; // after descending: as made
        headings.forEach((other) => other.removeAttribute("aria-sort"));
        if (way) heading.setAttribute("aria-sort", way);
        const isNumeric = heading.classList.contains("number");
        const order = way ? sorted(rows, column, isNumeric, way === "ascending" ? 1 : -1) : rows;
        const all = document.createDocumentFragment();
        order.forEach((row) => all.append(row));
        body.append(all);
      });
    });
  }

  function filtered(table, rows) {
    let texts = null;
    const line = document.createElement("p");
    const label = document.createElement("label");
    const input = document.createElement("input");
    const count = document.createElement("output");
    line.className = "filter";
    input.type = "search";
    input.autocomplete = "off";
    label.append("Filter " + table.dataset.name + " ", input);
    line.append(label, " ", count);
    table.parentElement.before(line);
    input.addEventListener("input", function () {
      texts = texts || rows.map((row) => row.textContent.toLowerCase());
      const wanted = input.value.toLowerCase().split(/\s+/);
      let shown = 0;
      rows.forEach(function (row, i) {
        row.hidden = !wanted.every((word) => texts[i].includes(word));
        shown += !row.hidden;
      });
      count.textContent = input.value.trim() ? shown + " of " + rows.length : "";
    });
  }

  document.querySelectorAll("table").forEach(function (table) {
    const rows = Array.from(table.tBodies[0].rows);
    if (rows.length > 1) sortable(table, rows);
    if (rows.length >= FILTERED_FROM) filtered(table, rows);
  });
})();
