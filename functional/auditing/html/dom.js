// Elements are made here, and here alone: all text goes in as text, never as markup.

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

function body(section) {
  return document.querySelector(`#${section} > .body`);
}

// A color of a stage: along one ramp, as stages follow one another; the number always stands beside it.
function stageColor(stage, count) {
  const at = count > 1 ? stage / (count - 1) : 0;
  const [from, to, part] = at < 0.5 ? ["first", "middle", at * 200] : ["middle", "last", at * 200 - 100];
  return `color-mix(in oklab, var(--stage-${to}) ${part.toFixed(1)}%, var(--stage-${from}))`;
}

// A path that may break at its dots, with the numbers of repeated layers set off.
function pathText(path) {
  if (!path) return make("span", { class: "path none" }, "the plan as a whole");
  const parts = path.split(/(\.(?!\.|\d+\})|\{\d+\.\.\d+\})/).filter(Boolean);
  const name = parts.map((part) => {
    if (/^\{\d+\.\.\d+\}$/.test(part)) return make("b", { class: "range" }, part);
    return part;
  });
  return make("span", { class: "path" }, ...name.flatMap((part) => (part === "." ? [".", make("wbr")] : [part])));
}

// A table from rows of texts or elements; columns whose cells are all numbers or sizes stand on the right.
function table(caption, heads, rows, { left = [] } = {}) {
  const isNumber = heads.map((_, column) =>
    !left.includes(column) && rows.every((row) => typeof row[column] !== "string" || /^[\d.,]+( ([KMGT]i)?B)?$|^not known$/.test(row[column])));
  const cell = (tag, content, column) =>
    make(tag, { class: isNumber[column] ? "number" : undefined, scope: tag === "th" ? "col" : undefined }, content);
  const element = make("table", {},
    make("caption", {}, caption),
    make("thead", {}, make("tr", {}, ...heads.map((head, column) => cell("th", head, column)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((content, column) => cell("td", content, column))))));
  return make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": caption }, element);
}

function details(summary, ...children) {
  return make("details", {}, make("summary", {}, summary), ...children);
}

function plural(number, word) {
  return `${number} ${word}${number === 1 || number === "1" ? "" : "s"}`;
}

// Rows of elements of which one at a time can be reached with the tab key, the others with the arrow keys. Returns what is to
// be called when the rows are others.
function rove(container, rows) {
  const stop = (element) => {
    for (const other of rows().flat()) other.setAttribute("tabindex", other === element ? "0" : "-1");
  };
  container.addEventListener("keydown", (event) => {
    const all = rows();
    const row = all.findIndex((elements) => elements.includes(document.activeElement));
    if (row < 0) return;
    const column = all[row].indexOf(document.activeElement);
    const moves = {
      ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
      Home: [row, 0], End: [row, Infinity],
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const clamp = (number, length) => Math.max(0, Math.min(number, length - 1));
    const next = all[clamp(moves[event.key][0], all.length)];
    const element = next[clamp(moves[event.key][1], next.length)];
    stop(element);
    element.focus();
  });
  const refresh = () => stop(rows().flat()[0]);
  refresh();
  return refresh;
}
