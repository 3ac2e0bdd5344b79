// The types of activations: a row for modules of repeated layers, with all that a module computes itself below it.

function drawTypes(data) {
  if (!data.types) {
    body("types").append(make("p", {}, "Not known: activations were not followed while planning, as no example inputs were given."));
    return;
  }
  body("types").append(
    make("p", { class: "note" }, `${data.types.head}.`),
    make("ul", { class: "types" }, ...data.types.rows.map(typesRow)));
}

function typesRow({ path, inputs, outputs, calls }) {
  return make("li", { "data-path": path },
    path ? pathText(path) : make("span", { class: "path" }, "the model"),
    make("div", {}, make("code", {}, typesText(inputs)), " → ", make("code", {}, typesText(outputs))),
    calls.length ? details(plural(calls.length, "call"), table(`calls in ${path || "the model"}`, ["operator", "result", "line"], calls)) : null);
}

function typesText(types) {
  return types.join(", ") || "nothing";
}
