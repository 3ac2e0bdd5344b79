// Which plan it is, and whether it may be executed.

function drawHead(data) {
  document.getElementById("heading").append(data.heading);
  const counts = [plural(data.num_errors, "error"), plural(data.num_warnings, "warning")];
  if (data.num_silenced) counts.push(`${data.num_silenced} silenced`);
  document.getElementById("verdict").append(
    make("strong", { class: data.ok ? "ok" : "refused" }, data.ok ? "ok" : "not ok"),
    make("span", {}, data.verdict),
    make("span", { class: "muted" }, counts.join(", ")));
  document.getElementById("facts").append(...data.facts.map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  document.getElementById("fingerprint").append(make("span", { class: "muted" }, "fingerprint "), make("code", {}, data.fingerprint));
}
