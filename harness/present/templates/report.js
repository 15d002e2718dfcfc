// Headings sort (tablesort); a filter shows the rows that hold all of its words.
Tablesort.extend("number", () => false, (a, b) => b - a);

function filter(table, words, count) {
  const rows = [...table.tBodies[0].rows];
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
  }
  const shown = rows.filter((row) => !row.hidden).length;
  count.textContent = shown < rows.length ? `${shown} of ${rows.length} rows` : "";
}

for (const table of document.querySelectorAll("table")) {
  new Tablesort(table);
  if (table.tBodies[0].rows.length < 12) continue;
  const field = document.createElement("input");
  const count = document.createElement("span");
  field.type = "search";
  field.placeholder = "Filter rows";
  field.setAttribute("aria-label", `Filter rows of ${table.getAttribute("aria-label")}`);
  count.setAttribute("role", "status");
  field.addEventListener("input", () => filter(table, field.value.toLowerCase().split(/\s+/), count));
  table.closest(".table").querySelector(".tools").prepend(field, count);
}
document.documentElement.classList.add("scripted");
