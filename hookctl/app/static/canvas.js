// Places on a picture. Box: drag to draw, drag it to move it, a corner to resize it. Brush and eraser:
// a mask, cell by cell. props.value = {places: [{x0, y0, x1, y1, text} | {runs: [...], text}],
// picture: URL, words: [...]}; boxes in fractions, runs of cells outside, inside, outside ... a mask.
const COLOURS = props.colours, GRID = props.grid;
const SMALL = 0.02; // of the canvas: a shorter drag is a click
const NS = "http://www.w3.org/2000/svg";
const sheet = element.querySelector(".sheet");
const svg = element.querySelector("svg");
const img = element.querySelector("img");
const paint = element.querySelector(".paint");
const list = element.querySelector(".list");
const width = element.querySelector(".width");
const anew = element.querySelector(".anew");
const names = "words-" + Math.random().toString(36).slice(2);
let places = [], words = [], picked = -1, drag = null, timer = null, tool = "box";

const colour = n => COLOURS[n % COLOURS.length];
const clamp = x => Math.min(1, Math.max(0, x));

function cellsOf(runs) {
  const cells = new Uint8Array(GRID * GRID);
  let at = 0;
  runs.forEach((n, k) => { if (k % 2) cells.fill(1, at, at + n); at += n; });
  return cells;
}

function runsOf(cells) {
  const runs = [];
  for (let at = 0, inside = 0; at < cells.length; inside = 1 - inside) {
    let end = cells.indexOf(1 - inside, at);
    if (end < 0) end = cells.length;
    runs.push(end - at);
    at = end;
  }
  return runs;
}

function send() {
  clearTimeout(timer);
  const said = places.map(({ cells, ...rest }) => cells ? { ...rest, runs: runsOf(cells) } : rest);
  props.value = { ...props.value, places: said };
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

function drawMasks() {
  const context = paint.getContext("2d"), image = context.createImageData(GRID, GRID);
  places.forEach((one, n) => {
    if (!one.cells) return;
    const value = parseInt(colour(n).slice(1), 16);
    const rgb = [value >> 16, (value >> 8) & 255, value & 255];
    const alpha = n === picked ? 190 : 140;
    for (let i = 0; i < one.cells.length; i++) if (one.cells[i])
      image.data.set([...rgb, alpha], 4 * i);
  });
  context.putImageData(image, 0, 0);
}

function drawBoxes() {
  svg.replaceChildren();
  places.forEach((b, n) => {
    if (b.cells) return;
    const at = { x: 1000 * b.x0, y: 1000 * b.y0,
                 width: 1000 * (b.x1 - b.x0), height: 1000 * (b.y1 - b.y0) };
    const line = { ...at, "vector-effect": "non-scaling-stroke" };
    add("rect", { ...line, class: "rim" }, svg);
    const rect = add("rect", { ...line, class: "box" + (n === picked ? " picked" : ""),
      style: `stroke:${colour(n)};fill:${colour(n)}`, "data-box": n }, svg);
    add("title", {}, rect).textContent = b.text || `place ${n + 1}`;
    for (const corner of ["00", "10", "01", "11"]) {
      const x = corner[0] === "0" ? b.x0 : b.x1, y = corner[1] === "0" ? b.y0 : b.y1;
      add("rect", { x: 1000 * x - 18, y: 1000 * y - 18, width: 36, height: 36, class: "corner",
        style: `fill:${colour(n)}`, "data-box": n, "data-corner": corner }, svg);
    }
  });
  sheet.classList.toggle("has-places", places.length > 0);
}

function drawList() {
  list.replaceChildren();
  const known = document.createElement("datalist");
  known.id = names;
  for (const word of words) known.appendChild(new Option(word));
  list.appendChild(known);
  places.forEach((b, n) => {
    const row = document.createElement("li");
    row.innerHTML = `<span class="dot" style="background:${colour(n)}"></span>
      <input aria-label="What belongs in place ${n + 1}" placeholder="what belongs here"
        list="${names}" maxlength="200"><button type="button" aria-label="Remove place ${n + 1}"
        title="Remove">×</button>`;
    row.querySelector(".dot").classList.toggle("painted", Boolean(b.cells));
    const input = row.querySelector("input");
    input.value = b.text;
    input.addEventListener("focus", () => { picked = n; drawPlaces(); });
    input.addEventListener("input", () => {
      b.text = input.value;
      clearTimeout(timer);
      timer = setTimeout(send, 250);
    });
    input.addEventListener("change", send);
    row.querySelector("button").addEventListener("click", () => { remove(n); draw(); send(); });
    list.appendChild(row);
  });
}

function remove(n) { places.splice(n, 1); picked = -1; }

function drawPlaces() {
  drawBoxes();
  drawMasks();
  const painting = tool === "brush" && picked >= 0 && places[picked].cells;
  anew.hidden = !painting;
  [...list.querySelectorAll("li")].forEach((row, n) => row.classList.toggle("picked", n === picked));
}

function draw() { drawList(); drawPlaces(); }

function take() {
  const value = props.value || {};
  places = (value.places || []).map(({ runs, ...b }) =>
    ({ ...b, text: b.text || "", ...(runs ? { cells: cellsOf(runs) } : {}) }));
  words = value.words || [];
  picked = Math.min(picked, places.length - 1);
  if (value.picture) img.src = value.picture; else img.removeAttribute("src");
  sheet.classList.toggle("has-picture", Boolean(value.picture));
  draw();
}

// -- brush and eraser

function dab(cells, x, y, inside) {
  const frame = svg.getBoundingClientRect(), side = Math.min(frame.width, frame.height);
  const radius = Number(width.value) / 200 * side;
  const w = frame.width / GRID, h = frame.height / GRID;
  for (let row = Math.max(0, Math.floor(y * GRID - radius / h));
       row <= Math.min(GRID - 1, y * GRID + radius / h); row++)
    for (let column = Math.max(0, Math.floor(x * GRID - radius / w));
         column <= Math.min(GRID - 1, x * GRID + radius / w); column++)
      if (Math.hypot((column + 0.5 - x * GRID) * w, (row + 0.5 - y * GRID) * h) <= radius)
        cells[row * GRID + column] = inside;
}

function stroke(x, y) {
  const inside = Number(tool === "brush");
  const whole = tool === "eraser" && !(picked >= 0 && places[picked].cells);
  const over = whole ? places.filter(one => one.cells) : [places[picked]];
  const count = Math.max(1, Math.ceil(GRID * Math.hypot(x - drag.x, y - drag.y)));
  for (let k = 1; k <= count; k++)
    for (const one of over)
      dab(one.cells, drag.x + (x - drag.x) * k / count, drag.y + (y - drag.y) * k / count, inside);
  Object.assign(drag, { x, y });
}

function begin(event, x, y) {
  drag = { kind: "paint", x, y };
  if (tool === "brush" && !(picked >= 0 && places[picked].cells)) {
    places.push({ cells: new Uint8Array(GRID * GRID), text: "" });
    picked = places.length - 1;
    drag.fresh = event.pointerType !== "touch"; // a keyboard would cover the picture
    drawList();
  }
  stroke(x, y);
}

const tools = element.querySelectorAll(".tools [data-tool]");
for (const button of tools)
  button.addEventListener("click", () => {
    tool = button.dataset.tool;
    for (const one of tools)
      one.setAttribute("aria-pressed", String(one === button));
    sheet.dataset.tool = tool;
    width.parentElement.hidden = tool === "box";
    drawPlaces();
  });
anew.addEventListener("click", () => { picked = -1; drawPlaces(); });

// -- the pointer

svg.addEventListener("pointerdown", event => {
  if (event.button) return;
  event.preventDefault();
  if (list.contains(document.activeElement)) document.activeElement.blur();
  svg.setPointerCapture(event.pointerId);
  const [x, y] = place(event), hit = event.target.dataset;
  if (tool !== "box") {
    begin(event, x, y);
  } else if (hit.corner) {
    picked = Number(hit.box);
    const b = places[picked];
    drag = { kind: "draw", x: hit.corner[0] === "0" ? b.x1 : b.x0,
             y: hit.corner[1] === "0" ? b.y1 : b.y0 };
  } else if (hit.box !== undefined) {
    picked = Number(hit.box);
    drag = { kind: "move", x, y, from: { ...places[picked] } };
  } else {
    places.push({ x0: x, y0: y, x1: x, y1: y, text: "" });
    picked = places.length - 1;
    drag = { kind: "draw", x, y, fresh: event.pointerType !== "touch", made: true };
  }
  drawPlaces();
});

svg.addEventListener("pointermove", event => {
  if (!drag) return;
  const [x, y] = place(event), b = places[picked];
  if (drag.kind === "paint") {
    stroke(x, y);
  } else if (drag.kind === "draw") {
    [b.x0, b.x1] = [Math.min(x, drag.x), Math.max(x, drag.x)];
    [b.y0, b.y1] = [Math.min(y, drag.y), Math.max(y, drag.y)];
  } else {
    const f = drag.from;
    const dx = Math.min(1 - f.x1, Math.max(-f.x0, x - drag.x));
    const dy = Math.min(1 - f.y1, Math.max(-f.y0, y - drag.y));
    Object.assign(b, { x0: f.x0 + dx, x1: f.x1 + dx, y0: f.y0 + dy, y1: f.y1 + dy });
  }
  drawPlaces();
});

function end() {
  if (!drag) return;
  const { kind, fresh, made } = drag;
  drag = null;
  if (kind === "paint") {
    for (let n = places.length - 1; n >= 0; n--)
      if (places[n].cells && !places[n].cells.includes(1)) remove(n);
  } else {
    const b = places[picked];
    if (b.x1 - b.x0 < SMALL || b.y1 - b.y0 < SMALL) {
      remove(picked);
      draw();
      if (!made) send();
      return;
    }
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
paint.width = paint.height = GRID;
take();
