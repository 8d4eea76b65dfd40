"use strict";
// A column head becomes a button: first click ascending, second descending, third the order as written.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const written = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  if (written.length < 2) continue;
  heads.forEach((head, column) => {
    const number = head.classList.contains("number");
    const compare = (first, second) => number ? first - second : first.localeCompare(second, "en", { numeric: true });
    const value = (row) => row.cells[column].dataset.value;
    const button = document.createElement("button");
    button.type = "button";
    button.title = "sort";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const order = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")];
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", order);
      const sign = order === "descending" ? -1 : 1;
      const filled = written.filter((row) => value(row) !== undefined);
      const empty = written.filter((row) => value(row) === undefined);
      filled.sort((first, second) => sign * compare(value(first), value(second)));
      body.append(...(order === "none" ? written : [...filled, ...empty]));
    });
  });
}
