// Sorts the tables of a comparison by the heading that is clicked: a second click turns the order.
// A method is a tbody of one or two rows, so that its control moves with it.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    // The buttons are made here: without a script there is nothing to click in vain.
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const turn = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const key = (body) => body.rows[0].cells[column].dataset.order ?? "";
      const compare = (a, b) => {
        // What was not measured stands last in either order.
        if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
        const difference = key(a) - key(b);
        return turn * (Number.isNaN(difference) ? key(a).localeCompare(key(b)) : difference);
      };
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", turn === 1 ? "ascending" : "descending");
      const methods = [...table.tBodies].filter((body) => body.classList.contains("method"));
      table.append(...methods.sort(compare));
    });
  });
}
