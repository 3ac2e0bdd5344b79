// The tensors: a row for those of repeated layers, with a strip for each axis that is split.

const MOST_ROWS = 400;
const MOST_LABELS = 26;

function drawTensors(data) {
  const { rows, num, num_stages, replicated } = data.tensors;
  const drawn = rows.map((row) => ({ row, element: null }));
  const state = { text: "", stage: "all", kind: "all", most: MOST_ROWS };
  const list = make("ul", { class: "tensors" });
  const said = make("span", { role: "status" });
  const whole = replicated[0] === "0" ? "" : ` ${replicated[0]} tensors of ${replicated[1]} are whole on every rank of their stage.`;
  const more = make("button", { type: "button", class: "more" }, "show all");

  const show = () => {
    const isMeant = searcher(state.text);
    const fits = drawn.filter(({ row }) =>
      (state.stage === "all" || row.stages.includes(Number(state.stage))) && (state.kind === "all" || row.kind === state.kind));
    const found = fits.map((one) => ({ one, matches: countMatches(one.row, isMeant) })).filter(({ matches }) => matches);
    list.replaceChildren(...found.slice(0, state.most).map(({ one, matches }) => {
      one.element ??= tensorRow(data, one.row);
      one.element.querySelector(".matches").textContent = matches < one.row.num ? `${matches} of ${one.row.num}` : "";
      return one.element;
    }));
    const total = found.reduce((sum, { matches }) => sum + matches, 0);
    said.textContent = `${total.toLocaleString("en")} of ${num} tensors, in ${plural(found.length, "row")}.`;
    more.hidden = found.length <= state.most;
    follow(chosen);
    refresh();
  };
  const refresh = rove(list, () => [...list.querySelectorAll(".strip")].map((strip) => [...strip.children]));
  const follow = (cell) => {
    for (const { row, element } of drawn) if (element) followRow(data, row, element, cell);
  };

  const search = make("input", { type: "search", placeholder: "path: words, or a glob such as **.[qkv]_proj", "aria-label": "Search by path", spellcheck: "false" });
  search.addEventListener("input", () => { state.text = search.value; show(); });
  const stages = make("select", { "aria-label": "Stage" }, make("option", { value: "all" }, "all stages"),
    ...Array.from({ length: num_stages }, (_, stage) => make("option", { value: String(stage) }, `stage ${stage}`)));
  stages.addEventListener("change", () => { state.stage = stages.value; show(); });
  const kinds = choose("kind", [["all", "all"], ["split", "split"], ["whole", "whole"], ["buffer", "buffers"]], (kind) => { state.kind = kind; show(); });
  more.addEventListener("click", () => { state.most = Infinity; show(); });

  const banner = make("p", { class: "banner", hidden: true });
  followers.push((cell) => { banner.hidden = !cell; banner.replaceChildren(...(cell ? bannerText(data, cell) : [])); follow(cell); });
  body("tensors").append(...[
    make("div", { class: "filters" }, search, num_stages > 1 ? stages : null, kinds),
    make("p", { class: "note" }, said, whole), banner, list, more]);
  show();
}

function bannerText(data, cell) {
  const clear = make("button", { type: "button" }, "show all");
  clear.addEventListener("click", () => chooseRanks(data, null));
  return [make("b", {}, cell.ranks), ` (${cell.at}): outlined in what follows. `, clear];
}

function tensorRow(data, row) {
  const layout = data.tensors.layouts[row.layout];
  const strips = layout.strips.length ? layout.strips.map((strip) => drawStrip(layout, strip)) : [wholeStrip(data, layout, row)];
  const notes = [row.source, ...row.notes, ...row.tie.map((path) => `= ${path}`)];
  return make("li", { "--stage": stageColor(row.places[0], data.num_stages), "data-path": row.path },
    make("div", { class: "name" }, pathText(row.path), make("span", { class: "matches" }), make("div", { class: "muted notes" }, notes.join(" · "))),
    make("div", { class: "type" }, make("code", {}, layout.type),
      make("span", { class: "chip" }, `stage ${row.stages.join(", ")}`)),
    make("div", { class: "sizes" }, make("b", {}, layout.rank), make("span", { class: "muted" }, layout.strips.length ? `of ${layout.whole}` : "whole")),
    make("div", { class: "strips" }, ...strips));
}

function wholeStrip(data, layout, row) {
  const segment = make("i", { class: "segment whole", "data-places": "", role: "img", "aria-label": "whole on every rank of its stage" }, "whole");
  tell(segment, () => [tipLine(make("b", {}, `every rank of stage ${row.stages.join(", ")}`)), placeTable([[ "each", [layout.index, layout.rank]]])]);
  const strip = make("div", { class: "strip" }, segment);
  return strip;
}

function drawStrip(layout, strip) {
  const segments = pieces(strip).map((piece) => drawSegment(strip, piece));
  const element = make("div", { class: `strip${segments.length > MOST_LABELS ? " dense" : ""}` }, ...segments);
  const empty = strip.empty.length ? `, nothing at ${strip.empty.join(", ")}` : "";
  return make("div", { class: "split" }, element, make("div", { class: "muted caption" }, `axis ${strip.axis} over ${strip.mesh_axis} × ${strip.num}${empty}`));
}

// The segments of a strip from its start to its end: what is held, what is not drawn, what is padding.
function pieces(strip) {
  const held = strip.segments.map(([start, stop, places]) => ({ kind: "held", start, stop, places }));
  const found = [];
  let end = 0;
  for (const piece of held) {
    if (piece.start > end && strip.skipped.length) found.push({ kind: "skipped", start: end, stop: piece.start });
    found.push(piece);
    end = piece.stop;
  }
  for (const [place, num] of strip.padding) {
    found.push({ kind: "padding", start: end, stop: end + num, places: [place] });
    end += num;
  }
  return found;
}

function drawSegment(strip, { kind, start, stop, places = [] }) {
  const label = kind === "skipped" ? `${strip.skipped[0]}..${strip.skipped[1]}` : kind === "padding" ? "" : joined(places);
  const shade = strip.num > 1 && places.length ? places[0] / (strip.num - 1) : 0;
  const segment = make("i", {
    class: `segment ${kind}${strip.blocks.includes(start) ? " block" : ""}`,
    role: "img",
    "aria-label": segmentWords(strip, kind, start, stop, places),
    "data-places": places.join(" "),
    "--size": strip.skipped.length ? 1 : stop - start,
    "--shade": shade.toFixed(3),
  }, label);
  return tell(segment, () => [
    tipLine(make("b", {}, segmentWords(strip, kind, start, stop, places))),
    ...(places.length ? [placeTable(places.slice(0, 8).map((place) => [`${strip.mesh_axis} ${place}`, strip.places[place]]))] : []),
  ]);
}

function segmentWords(strip, kind, start, stop, places) {
  if (kind === "padding") return `${plural(stop - start, "entry").replace("entrys", "entries")} of padding, at ${strip.mesh_axis} ${joined(places)}`;
  const entries = `axis ${strip.axis}, entries ${start}:${stop}`;
  return `${entries}, at ${strip.mesh_axis} ${kind === "skipped" ? `${strip.skipped[0]}..${strip.skipped[1]}` : joined(places)}`;
}

function joined(places) {
  const isRun = places.length > 2 && places.at(-1) - places[0] === places.length - 1;
  return isRun ? `${places[0]}..${places.at(-1)}` : places.join(", ");
}

// What is held at some places: the intervals of each axis, and bytes.
function placeTable(places) {
  return tipTable(places.map(([name, [intervals, bytes]]) => [name, ...intervals.map((text, axis) => `axis ${axis}  ${text}`), bytes]));
}

function followRow(data, row, element, cell) {
  const isHere = cell && row.places.includes(cell.pipe);
  element.classList.toggle("elsewhere", Boolean(cell) && !isHere);
  const strips = data.tensors.layouts[row.layout].strips;
  element.querySelectorAll(".strip").forEach((strip, number) => {
    for (const segment of strip.children) {
      const places = (segment.dataset.places || "").split(" ").filter(Boolean).map(Number);
      const meshAxis = strips.length ? strips[number].mesh_axis : null;
      const isHeld = isHere && (meshAxis === null || places.some((place) => standsAt(data, cell, meshAxis, place)));
      segment.classList.toggle("chosen", Boolean(isHeld));
    }
  });
}
