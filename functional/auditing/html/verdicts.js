// What may hurt, what somebody silenced, and what is proven.

function drawFindings(data) {
  const { findings, silenced } = data.verdicts;
  const target = body("findings");
  if (findings.length) {
    const list = make("ol", { class: "findings" }, ...findings.map(finding));
    if (data.num_errors && data.num_warnings) target.append(severities(data, list));
    target.append(list);
  } else {
    target.append(make("p", {}, "None."));
  }
  if (silenced.length) {
    target.append(details(`${data.num_silenced} silenced`, make("ol", { class: "findings" }, ...silenced.map(finding))));
  }
}

function finding({ code, severity, title, cases, reason }) {
  const one = ([path, cause, fix]) => make("div", { class: "case" },
    pathText(path), make("p", {}, cause), fix && !reason ? labelled("fix", fix) : null);
  return make("li", { class: reason ? "silenced" : severity, "data-severity": severity },
    make("div", { class: "code" }, make("b", {}, code), make("span", { class: "severity" }, reason ? "silenced" : severity)),
    make("div", {}, make("div", { class: "what" }, title), reason ? labelled("because", reason) : null, ...cases.map(one)));
}

function labelled(label, text) {
  return make("p", {}, make("span", { class: "label" }, label), text);
}

function severities(data, list) {
  const total = data.num_errors + data.num_warnings;
  const choices = [["all", total], ["error", data.num_errors], ["warning", data.num_warnings]];
  return choose("severity", choices.map(([value, number]) => [value, `${value === "all" ? "all" : `${value}s`} ${number}`]), (chosen) => {
    for (const item of list.children) item.hidden = chosen !== "all" && item.dataset.severity !== chosen;
  });
}

// One of a few: radio buttons that look like one.
function choose(name, choices, changed) {
  const inputs = choices.map(([value, text], number) => {
    const input = make("input", { type: "radio", name, value, checked: number === 0 });
    input.addEventListener("change", () => changed(value));
    return make("label", {}, input, make("span", {}, text));
  });
  return make("fieldset", { class: "choose" }, make("legend", { class: "hidden" }, name), ...inputs);
}

function drawProofs(data) {
  const { proofs, trusted } = data.verdicts;
  body("proofs").append(make("ul", { class: "proofs" }, ...proofs.map(proof)));
  if (trusted.length) {
    const rows = trusted.map(([path, said]) => make("li", {}, pathText(path), make("p", {}, said)));
    body("proofs").append(details(`${plural(trusted.length, "module")} trusted`, make("ul", { class: "trusted" }, ...rows)));
  }
}

const CLASSES = { holds: "holds", fails: "fails", "not followed": "open" };

function proof({ law, says, answer, result, open, failures }) {
  const rows = failures.map(([path, causes, numMore]) => make("li", {},
    pathText(path), ...causes.map((cause) => make("p", {}, cause)), numMore ? make("p", {}, `and ${plural(numMore, "case")} more`) : null));
  rows.push(...open.map((cause) => make("li", {}, make("p", {}, cause))));
  return make("li", { class: CLASSES[answer], "data-law": law },
    make("b", {}, law), make("span", { class: "says" }, says),
    make("span", { class: "result" }, result),
    rows.length ? make("ul", { class: "failures" }, ...rows) : null);
}
