// What ranks send: sums by stage and mesh axis, then the messages that they sum.

function drawTraffic(data) {
  const { nodes, matrix, steps, boundaries, execution } = data.traffic;
  const target = body("traffic");
  if (steps.length) {
    target.append(trafficMatrix(nodes, matrix), stepTable(nodes, steps));
  } else {
    target.append(make("p", {}, "Nothing is known to be sent in a training step."));
  }
  if (boundaries.length) {
    target.append(table("What crosses to the next stage", ["after stage", "tensors", "bytes a micro-batch", "of gradients back"], boundaries, { left: [0] }));
  }
  const heads = ["stage", "ranks", "over", "op", "messages", "bytes to each rank"];
  target.append(execution.length
    ? table("Messages while the plan is executed", heads, execution, { left: [0] })
    : make("p", {}, "Nothing is sent while the plan is executed."));
}

function trafficMatrix(nodes, { columns, most, rows }) {
  const cells = rows.map(([stages, sizes]) => [`stage ${stages}`, ...sizes.map(([wire, text, between]) =>
    make("div", { class: "heat", "--heat": most ? (wire / most).toFixed(4) : "0" },
      make("b", {}, wire ? text : "–"), nodes && wire ? make("span", { class: "muted" }, `${between} between nodes`) : null))]);
  const element = table("Bytes that one rank puts on the wire in a training step", ["", ...columns], cells, { left: [0] });
  element.classList.add("matrix");
  return element;
}

function stepTable(nodes, steps) {
  const most = Math.max(...steps.map((row) => row.wire_bytes), 1);
  const heads = ["stage", "over", "what", "op", "messages", "bytes", ...(nodes ? ["inside", "between nodes"] : ["on the wire"]), ""];
  const rows = steps.map((row) => [
    ...row.cells, ...(nodes ? [row.inside, row.between] : [row.wire]),
    make("div", { class: "spark", "--part": `${(100 * row.wire_bytes / most).toFixed(2)}%` }),
  ]);
  return table("Messages of a training step", heads, rows, { left: [0] });
}
