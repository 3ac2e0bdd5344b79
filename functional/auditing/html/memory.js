// What ranks hold: a bar for those with the same bytes.

function drawMemory(data) {
  const { memory } = data;
  const names = Object.fromEntries(memory.columns);
  const legend = memory.parts.map((part) => swatch(part, names[part]));
  if ("activation" in names) legend.push(swatch("activation", "activations, an estimate"));
  legend.push(swatch("executing", "peak while executing"));
  const bars = memory.rows.map((row) => memoryBar(data, row));
  const heads = ["stage", "ranks", "first", ...memory.columns.map(([, name]) => name)];
  const rows = memory.rows.map((row) => [row.stages, row.ranks, String(row.first), ...memory.columns.map(([name]) => row.text[name])]);
  const focusable = bars.map((bar) => [bar.querySelector(".bar")]);
  rove(body("memory"), () => focusable);
  body("memory").append(
    make("p", { class: "legend" }, ...legend),
    make("div", { class: "bars" }, memory.capacity ? capacityScale(memory) : null, ...bars),
    details("all numbers", table("Bytes on each rank", heads, rows, { left: [0] })));
  followers.push((cell) => bars.forEach((bar, number) => bar.classList.toggle("chosen", Boolean(cell && cell.memory.includes(number)))));
}

function swatch(part, text) {
  return make("span", {}, make("i", { class: `swatch ${part}` }), text);
}

function capacityScale({ capacity, scale }) {
  const at = 100 * capacity[0] / scale;
  const label = make("span", { class: `capacity${at > 50 ? " from-right" : ""}`, "--at": `${at.toFixed(3)}%` }, `a device has ${capacity[1]}`);
  return make("div", { class: "bar-row scale-row" }, make("div", {}), make("div", { class: "scale" }, label), make("div", {}));
}

function memoryBar(data, row) {
  const { parts, scale, capacity } = data.memory;
  const percent = (bytes) => `${(100 * bytes / scale).toFixed(3)}%`;
  const pieces = parts.map((part) => make("i", { class: part, "--part": percent(row.bytes[part]) }));
  if (row.bytes.activation) pieces.push(make("i", { class: "activation", "--part": percent(row.bytes.activation) }));
  const bar = make("div", { class: "bar", role: "img", "aria-label": `${row.ranks} ranks of stage ${row.stages}: peak ${row.text.peak}` },
    make("div", { class: "stack" }, ...pieces),
    make("i", { class: "mark executing", "--at": percent(row.bytes.executing) }),
    capacity ? make("i", { class: "mark capacity", "--at": percent(capacity[0]) }) : null);
  tell(bar, () => [tipLine(make("b", {}, `stage ${row.stages}, ${plural(row.ranks, "rank")}`)), memoryTable(data, row)]);
  return make("div", { class: `bar-row${row.over ? " over" : ""}`, "--stage": stageColor(row.stage, data.num_stages) },
    make("div", { class: "who" }, make("b", {}, `stage ${row.stages}`), make("span", { class: "muted" }, `${plural(row.ranks, "rank")}, first ${row.first}`)),
    bar,
    make("div", { class: "peak number" }, row.text.peak, row.over ? make("span", { class: "severity" }, " over") : null));
}

function memoryTable(data, row) {
  return tipTable(data.memory.columns.map(([name, text]) => [swatch(name, text), row.text[name]]));
}
