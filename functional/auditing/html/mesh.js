// The mesh: for each stage a table of cells, columns along its last mesh axis, rows along the others of a stage. A cell
// that is chosen shows, further down, what its ranks hold.

const FEW_CELLS = 32;
let chosen = null;
const followers = [];

function drawMesh(data) {
  const { mesh } = data;
  const lines = [];
  lines.push(`Rows are places along ${mesh.down}, columns along ${mesh.across}.`);
  if (mesh.collapsed.length) lines.push(`Ranks that are alike along ${mesh.collapsed.join(" and ")} share a cell, with their number in it.`);
  lines.push(`The line in a cell is its peak of memory${data.memory.capacity ? ", red where a device has less" : ""}; choose a cell to see below what it holds.`);
  const isRoomy = mesh.stages.length * mesh.rows.length * mesh.columns.length <= FEW_CELLS;
  const stages = make("div", { class: `stages${isRoomy ? " roomy" : ""}` }, ...mesh.stages.map((stage, pipe) => drawStage(data, stage, pipe)));
  const rows = [...stages.querySelectorAll("tbody tr")].map((row) => [...row.querySelectorAll(".rank")]);
  rove(stages, () => rows);
  body("mesh").append(make("p", { class: "note" }, lines.join(" ")), stages);
}

function drawStage(data, stage, pipe) {
  const { rows, columns } = data.mesh;
  const cells = stage.cells.map((row) => row.map((cell) => rankCell(data, cell, pipe)));
  const grid = make("table", { class: "ranks" },
    make("thead", {}, make("tr", {},
      make("th", {}, make("span", { class: "hidden" }, `${data.mesh.down} by ${data.mesh.across}`)),
      ...columns.map((column) => make("th", { scope: "col" }, column)))),
    make("tbody", {}, ...cells.map((row, number) =>
      make("tr", {}, make("th", { scope: "row" }, rows[number]), ...row.map((cell) => make("td", {}, cell))))));
  return make("div", { class: "stage", "--stage": stageColor(pipe, data.num_stages) },
    make("div", { class: "stage-name" }, make("b", {}, `stage ${pipe}`), make("span", { class: "muted" }, stage.ranks)), grid);
}

function rankCell(data, cell, pipe) {
  const peak = Math.max(...cell.memory.map((number) => data.memory.rows[number].bytes.peak));
  const over = cell.memory.some((number) => data.memory.rows[number].over);
  const button = make("button", {
    type: "button",
    class: `rank${cell.num === "1" ? "" : " pile"}${over ? " over" : ""}`,
    "aria-label": `${cell.ranks}, ${cell.at}`,
    "aria-pressed": "false",
    "--full": `${(100 * peak / data.memory.scale).toFixed(1)}%`,
  }, cell.num === "1" ? String(cell.first) : `×${cell.num}`);
  button.addEventListener("click", () => chooseRanks(data, chosen && chosen.button === button ? null : { ...cell, pipe, button }));
  return tell(button, () => [
    tipLine(make("b", {}, cell.ranks)), tipLine(cell.at),
    ...cell.memory.slice(0, 3).map((number) => memoryTable(data, data.memory.rows[number])),
    ...(cell.memory.length > 3 ? [tipLine(`and ${cell.memory.length - 3} other sums of bytes`)] : []),
  ]);
}

function chooseRanks(data, cell) {
  if (chosen) chosen.button.setAttribute("aria-pressed", "false");
  chosen = cell;
  if (chosen) chosen.button.setAttribute("aria-pressed", "true");
  for (const follow of followers) follow(chosen);
}

// Whether some of the chosen ranks stand at a place along a mesh axis.
function standsAt(data, cell, meshAxis, place) {
  const within = ([start, stop], number) => start <= number && number < stop;
  if (meshAxis in cell.places) return within(cell.places[meshAxis], place);
  const [outer, inner, num] = data.mesh.factors[meshAxis];
  return within(cell.places[outer], Math.floor(place / num)) && within(cell.places[inner], place % num);
}
