// Cards: their HTML comes from the server, all of it anew at each change. What is typed is kept here: it goes
// along with whatever is pressed next, and is put back into cards that are drawn anew, and so is the focus.
// props.value = {html} from the server, {typed: {card: {field: value}}, press, number} to it.
const root = element.querySelector(".deck"), typed = {};
let shown = null, number = 0;

function read(field) {
  const inputs = [...field.querySelectorAll("input, textarea")];
  const checked = inputs.filter(one => one.checked).map(one => one.value);
  switch (field.dataset.kind) {
    case "switch": return inputs[0].checked;
    case "words": return checked;
    case "choice": return checked[0];
    default: return inputs[0].value;
  }
}

function write(field, value) {
  const inputs = [...field.querySelectorAll("input, textarea")];
  switch (field.dataset.kind) {
    case "switch": inputs[0].checked = value; break;
    case "words": inputs.forEach(one => { one.checked = value.includes(one.value); }); break;
    case "choice": inputs.forEach(one => { one.checked = one.value === value; }); break;
    default: inputs.forEach(one => { one.value = value; });  // a slider has its number beside it
  }
}

function say(more = {}) { props.value = { typed, ...more }; }

function focused() {
  const one = document.activeElement, field = root.contains(one) && one.closest(".field");
  if (!field) return null;
  const at = [...field.querySelectorAll("input, textarea")].indexOf(one);
  return { ...field.dataset, at, from: one.selectionStart, to: one.selectionEnd };
}

function draw() {
  const html = (props.value || {}).html;
  if (html === undefined) return;
  if (html !== shown) {
    const had = focused(), open = [...root.querySelectorAll("details[open]")].map(one => one.dataset.card);
    root.innerHTML = shown = html;
    for (const field of root.querySelectorAll(".field")) {
      const { card, field: name } = field.dataset;
      if (name in (typed[card] || {})) write(field, typed[card][name]);
      if (!had || card !== had.card || name !== had.field) continue;
      field.closest("details")?.setAttribute("open", "");
      const again = field.querySelectorAll("input, textarea")[had.at];
      again?.focus({ preventScroll: true });
      if (again && had.from != null) again.setSelectionRange(had.from, had.to);
    }
    for (const one of root.querySelectorAll("details")) one.open ||= open.includes(one.dataset.card);
  }
  say();
}

root.addEventListener("input", event => {
  const field = event.target.closest(".field");
  if (!field) return;
  const { card, field: name, kind } = field.dataset;
  if (kind === "slider") for (const one of field.querySelectorAll("input"))
    if (one !== event.target) one.value = event.target.value;
  typed[card] = { ...typed[card], [name]: kind === "slider" ? event.target.value : read(field) };
  say();
});

root.addEventListener("click", event => {
  const button = event.target.closest("[data-press]");
  if (!button) return;
  say({ press: button.dataset.press, number: ++number });  // the same twice is heard twice
  trigger("input");
});

watch("value", draw);
draw();
