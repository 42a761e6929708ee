// Boxes drawn on a picture: drag to draw, drag a box to move it, a corner to resize it.
// props.value = {boxes: [{x0, y0, x1, y1, text}], picture: URL, words: [...]}, in fractions.
const COLOURS = props.colours;
const SMALL = 0.02; // of the canvas: a shorter drag is a click
const NS = "http://www.w3.org/2000/svg";
const sheet = element.querySelector(".sheet");
const svg = element.querySelector("svg");
const img = element.querySelector("img");
const list = element.querySelector(".list");
const names = "words-" + Math.random().toString(36).slice(2);
let boxes = [], words = [], picked = -1, drag = null, timer = null;

const colour = n => COLOURS[n % COLOURS.length];
const clamp = x => Math.min(1, Math.max(0, x));

function send() {
  clearTimeout(timer);
  props.value = { ...props.value, boxes: boxes.map(b => ({ ...b })) };
  trigger("input");
}

function place(event) {
  const frame = svg.getBoundingClientRect();
  return [clamp((event.clientX - frame.left) / frame.width),
          clamp((event.clientY - frame.top) / frame.height)];
}

function add(name, attributes, parent) {
  const made = document.createElementNS(NS, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  parent.appendChild(made);
  return made;
}

function drawBoxes() {
  svg.replaceChildren();
  boxes.forEach((b, n) => {
    const at = { x: 1000 * b.x0, y: 1000 * b.y0,
                 width: 1000 * (b.x1 - b.x0), height: 1000 * (b.y1 - b.y0) };
    const line = { ...at, "vector-effect": "non-scaling-stroke" };
    add("rect", { ...line, class: "rim" }, svg);
    const rect = add("rect", { ...line, class: "box" + (n === picked ? " picked" : ""),
      style: `stroke:${colour(n)};fill:${colour(n)}`, "data-box": n }, svg);
    add("title", {}, rect).textContent = b.text || `box ${n + 1}`;
    for (const corner of ["00", "10", "01", "11"]) {
      const x = corner[0] === "0" ? b.x0 : b.x1, y = corner[1] === "0" ? b.y0 : b.y1;
      add("rect", { x: 1000 * x - 18, y: 1000 * y - 18, width: 36, height: 36, class: "corner",
        style: `fill:${colour(n)}`, "data-box": n, "data-corner": corner }, svg);
    }
  });
  sheet.classList.toggle("has-boxes", boxes.length > 0);
}

function drawList() {
  list.replaceChildren();
  const known = document.createElement("datalist");
  known.id = names;
  for (const word of words) known.appendChild(new Option(word));
  list.appendChild(known);
  boxes.forEach((b, n) => {
    const row = document.createElement("li");
    row.innerHTML = `<span class="dot" style="background:${colour(n)}"></span>
      <input aria-label="What belongs in box ${n + 1}" placeholder="what belongs here"
        list="${names}" maxlength="200"><button type="button" aria-label="Remove box ${n + 1}"
        title="Remove">×</button>`;
    const input = row.querySelector("input");
    input.value = b.text;
    input.addEventListener("focus", () => { picked = n; drawBoxes(); });
    input.addEventListener("input", () => {
      b.text = input.value;
      clearTimeout(timer);
      timer = setTimeout(send, 250);
    });
    input.addEventListener("change", send);
    row.querySelector("button").addEventListener("click", () => {
      boxes.splice(n, 1);
      picked = -1;
      draw();
      send();
    });
    list.appendChild(row);
  });
}

function draw() { drawBoxes(); drawList(); }

function take() {
  const value = props.value || {};
  boxes = (value.boxes || []).map(b => ({ ...b, text: b.text || "" }));
  words = value.words || [];
  picked = Math.min(picked, boxes.length - 1);
  if (value.picture) img.src = value.picture; else img.removeAttribute("src");
  sheet.classList.toggle("has-picture", Boolean(value.picture));
  draw();
}

svg.addEventListener("pointerdown", event => {
  if (event.button) return;
  event.preventDefault();
  svg.setPointerCapture(event.pointerId);
  const [x, y] = place(event), hit = event.target.dataset;
  if (hit.corner) {
    picked = Number(hit.box);
    const b = boxes[picked];
    drag = { kind: "draw", x: hit.corner[0] === "0" ? b.x1 : b.x0,
             y: hit.corner[1] === "0" ? b.y1 : b.y0 };
  } else if (hit.box !== undefined) {
    picked = Number(hit.box);
    drag = { kind: "move", x, y, from: { ...boxes[picked] } };
  } else {
    boxes.push({ x0: x, y0: y, x1: x, y1: y, text: "" });
    picked = boxes.length - 1;
    drag = { kind: "draw", x, y, fresh: true };
  }
  drawBoxes();
});

svg.addEventListener("pointermove", event => {
  if (!drag) return;
  const [x, y] = place(event), b = boxes[picked];
  if (drag.kind === "draw") {
    [b.x0, b.x1] = [Math.min(x, drag.x), Math.max(x, drag.x)];
    [b.y0, b.y1] = [Math.min(y, drag.y), Math.max(y, drag.y)];
  } else {
    const f = drag.from;
    const dx = Math.min(1 - f.x1, Math.max(-f.x0, x - drag.x));
    const dy = Math.min(1 - f.y1, Math.max(-f.y0, y - drag.y));
    Object.assign(b, { x0: f.x0 + dx, x1: f.x1 + dx, y0: f.y0 + dy, y1: f.y1 + dy });
  }
  drawBoxes();
});

function end() {
  if (!drag) return;
  const b = boxes[picked], fresh = drag.fresh;
  drag = null;
  if (b.x1 - b.x0 < SMALL || b.y1 - b.y0 < SMALL) {
    boxes.splice(picked, 1);
    picked = -1;
    draw();
    if (!fresh) send();
    return;
  }
  draw();
  send();
  if (fresh) list.querySelectorAll("input")[picked].focus({ preventScroll: true });
}

svg.addEventListener("pointerup", end);
svg.addEventListener("pointercancel", end);
watch("value", () => { if (!drag && !list.contains(document.activeElement)) take(); else {
  const value = props.value || {}; words = value.words || words;
  if (value.picture) { img.src = value.picture; sheet.classList.add("has-picture"); } } });
take();
