// A title of a table is a button that sorts its rows: ascending, descending, then as they were.
const missing = (text) => ["", "-", "not measured"].includes(text);
const words = (row, place) => row.cells[place].textContent.trim();

// The number with which a cell begins, in one unit for a column: "×1.033 (1.012–1.054)", "853.3 ms", "n^1.400".
const number = (text) => {
  const found = text.match(/^(?:×|n\^)?([+-]?[\d,]*\.?\d+(?:e-?\d+)?)( ms)?/);
  return found ? Number(found[1].replaceAll(",", "")) / (found[2] ? 1000 : 1) : NaN;
};

const compare = (a, b, sign) => {
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  const [x, y] = [number(a), number(b)];
  if (isNaN(x) || isNaN(y)) return sign * (isNaN(x) - isNaN(y) || a.localeCompare(b, "en", { numeric: true }));
  return sign * (x - y);
};

for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], rows = [...body.rows], titles = [...table.tHead.rows[0].cells];
  titles.forEach((title, place) => {
    const button = document.createElement("button");
    button.append(...title.childNodes);
    title.append(button);
    button.addEventListener("click", () => {
      const order = { ascending: "descending", descending: null }[title.getAttribute("aria-sort")];
      titles.forEach((each) => each.removeAttribute("aria-sort"));
      const next = order === undefined ? "ascending" : order;
      if (next) title.setAttribute("aria-sort", next);
      const sign = next === "descending" ? -1 : 1;
      const sorted = (a, b) => compare(words(a, place), words(b, place), sign);
      body.classList.toggle("sorted", next !== null);
      body.append(...(next ? [...rows].sort(sorted) : rows));
    });
  });
}
