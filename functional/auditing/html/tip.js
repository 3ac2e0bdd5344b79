// What is said of an element while the pointer is on it, or the keyboard: one box for the page, filled when it is needed.

const tip = document.getElementById("tip");
const tellings = new WeakMap();
let told = null;

function tell(element, lines) {
  tellings.set(element, lines);
  return element;
}

function showTip(element) {
  hideTip();
  told = element;
  tip.replaceChildren(...tellings.get(element)());
  tip.hidden = false;
  element.setAttribute("aria-describedby", "tip");
  placeTip(element);
}

function placeTip(element) {
  const around = element.getBoundingClientRect();
  const box = tip.getBoundingClientRect();
  const width = document.documentElement.clientWidth;
  const left = Math.max(8, Math.min(around.left + around.width / 2 - box.width / 2, width - box.width - 8));
  const below = around.bottom + 8;
  const fits = below + box.height < window.innerHeight || around.top < box.height + 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${fits ? below : around.top - box.height - 8}px`;
}

function hideTip() {
  if (!told) return;
  told.removeAttribute("aria-describedby");
  told = null;
  tip.hidden = true;
}

function teller(event) {
  let element = event.target instanceof Element ? event.target : null;
  while (element && !tellings.has(element)) element = element.parentElement;
  return element;
}

for (const [kind, leave] of [["pointerover", "pointerout"], ["focusin", "focusout"]]) {
  document.addEventListener(kind, (event) => {
    const element = teller(event);
    if (element && element !== told) showTip(element);
  });
  document.addEventListener(leave, (event) => {
    if (teller(event) === told && !(told && told.contains(event.relatedTarget))) hideTip();
  });
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
// What is pointed at, or reached with the keyboard, is often scrolled into view: then the box follows.
document.addEventListener("scroll", () => {
  if (told && (told === document.activeElement || told.matches(":hover"))) placeTip(told);
  else hideTip();
}, { passive: true, capture: true });

function tipLine(...children) {
  return make("div", {}, ...children);
}

function tipTable(rows) {
  return make("table", {}, make("tbody", {}, ...rows.map(([name, ...cells]) =>
    make("tr", {}, make("th", { scope: "row" }, name), ...cells.map((cell) => make("td", {}, cell))))));
}
