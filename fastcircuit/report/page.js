"use strict";
// The page: Python has drawn bands and nodes; this draws the edges that the filters let through and answers the pointer,
// the keyboard and the search box. Text from the circuit only ever enters as textContent.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const drawing = byId("drawing"), edgeLayer = byId("edges"), panel = byId("panel"), search = byId("search");
const nodeElements = data.nodes.map((_, index) => byId("n" + index));
const SVG = "http://www.w3.org/2000/svg";

let shown = []; // edges that pass the filters
let drawn = new Map(); // edge -> its path element, if it is on screen
let pinned = -1;
let hits = [];

// ---- edges -----------------------------------------------------------------------------------------------------------

const readerOf = (edge) => data.readers[data.edges.reader[edge]];
const edgesOut = data.nodes.map(() => []), edgesIn = data.nodes.map(() => []);
data.edges.reader.forEach((reader, edge) => {
  edgesOut[data.edges.writer[edge]].push(edge);
  edgesIn[data.readers[reader].node].push(edge);
});
// A query head also reads through the key/value node of its group, which the group's outline shows.
const mates = data.nodes.map((node) => node.mates);
const incoming = (node) => edgesIn[node].concat(...mates[node].filter((mate) => data.nodes[mate].kind === "kv").map((mate) => edgesIn[mate]));

function path(edge) {
  const element = document.createElementNS(SVG, "path");
  const [x0, y0, x1, y1, x2, y2, x3, y3] = data.edges.curve[edge];
  element.setAttribute("d", `M${x0} ${y0}C${x1} ${y1} ${x2} ${y2} ${x3} ${y3}`);
  element.setAttribute("class", "edge-" + readerOf(edge).type);
  element.setAttribute("stroke-width", data.edges.width[edge]);
  return element;
}

function redraw(edges) {
  drawn = new Map(edges.map((edge) => [edge, path(edge)]));
  edgeLayer.replaceChildren(...drawn.values());
}

const tooMany = () => shown.length > data.mostDrawn;

function applyFilters() {
  const types = new Set([...document.querySelectorAll("#types input:checked")].map((box) => box.value));
  const from = Number(byId("from").value), to = Number(byId("to").value);
  const inside = data.nodes.map((node) => from <= node.layer && node.layer <= to);
  shown = [];
  data.edges.reader.forEach((reader, edge) => {
    const { node, type } = data.readers[reader];
    if (types.has(type) && inside[node] && inside[data.edges.writer[edge]]) shown.push(edge);
  });
  nodeElements.forEach((element, index) => element.classList.toggle("outside", !inside[index]));
  edgeLayer.setAttribute("stroke-opacity", opacity(shown.length));
  redraw(tooMany() ? [] : shown);
  byId("notice").textContent = notice();
  show(pinned);
}

function opacity(count) {
  const { most, least, comfortable, fall } = data.opacity;
  return Math.max(least, most * Math.max(1, count / comfortable) ** -fall).toFixed(3);
}

function notice() {
  const count = shown.length.toLocaleString("en");
  if (!data.edges.reader.length) return "";
  if (!shown.length) return "No edge passes the filters.";
  if (tooMany()) return `${count} edges are too many to draw at once: point at a node to see its edges, or narrow the filters.`;
  return shown.length < data.edges.reader.length ? `${count} edges shown` : "";
}

// ---- one node --------------------------------------------------------------------------------------------------------

function show(node) {
  drawing.classList.toggle("focused", node >= 0);
  for (const element of document.querySelectorAll(".lit")) element.classList.remove("lit");
  nodeElements.forEach((element, index) => {
    element.classList.toggle("pinned", index === pinned);
    element.setAttribute("aria-pressed", String(index === pinned));
  });
  if (node < 0) {
    if (tooMany()) redraw([]);
    return describeNothing();
  }
  const passes = new Set(shown);
  const into = incoming(node).filter((edge) => passes.has(edge)), out = edgesOut[node].filter((edge) => passes.has(edge));
  if (tooMany()) redraw([...into, ...out]);
  const lit = new Set([node, ...mates[node]]);
  for (const edge of [...into, ...out]) {
    const element = drawn.get(edge);
    element.classList.add("lit");
    if (!tooMany()) edgeLayer.append(element); // on top
    lit.add(data.edges.writer[edge]).add(readerOf(edge).node);
  }
  for (const index of lit) nodeElements[index].classList.add("lit");
  describe(node, into, out);
}

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function describeNothing() {
  panel.replaceChildren(
    make("h2", "Nothing selected"),
    make("p", "Point at a node to see its edges; click it, or press Enter, to keep it selected. Escape lets go."),
    make("p", "Drag to move, scroll or use + and − to zoom. Arrow keys go from node to node."),
    make("p", data.note),
  );
}

function describe(node, into, out) {
  const { name, about } = data.nodes[node];
  panel.replaceChildren(
    make("h2", name),
    make("p", about),
    ...edgeList(`In (${into.length})`, into, (edge) => data.edges.writer[edge], (edge) => `${data.nodes[data.edges.writer[edge]].name} → ${readerOf(edge).name}`),
    ...edgeList(`Out (${out.length})`, out, (edge) => readerOf(edge).node, (edge) => "→ " + readerOf(edge).name),
  );
}

function edgeList(title, edges, otherEnd, label) {
  const list = make("ul");
  for (const edge of edges) {
    const item = make("li"), button = make("button");
    button.type = "button";
    button.append(make("span", undefined, "swatch type-" + readerOf(edge).type), make("span", label(edge)));
    if (data.edges.weight) button.append(make("span", data.edges.weight[edge], "weight"));
    button.addEventListener("click", () => select(otherEnd(edge)));
    item.append(button);
    list.append(item);
  }
  return [make("h3", title), list];
}

function pin(node) {
  pinned = node;
  show(node);
}

function select(node) {
  pin(node);
  bringIntoView(node);
  focusNode(node);
}

function focusNode(node) {
  nodeElements.forEach((element, index) => element.setAttribute("tabindex", index === node ? "0" : "-1"));
  nodeElements[node].focus({ preventScroll: true });
}

nodeElements.forEach((element, node) => {
  const count = `${incoming(node).length} edges in, ${edgesOut[node].length} out`;
  element.setAttribute("role", "button");
  element.setAttribute("aria-label", `${data.nodes[node].name}, ${data.nodes[node].about}, ${count}`);
  element.setAttribute("tabindex", node === 0 ? "0" : "-1"); // one tab stop; arrow keys go on from there
  element.addEventListener("pointerenter", () => pinned < 0 && !drag && show(node));
  element.addEventListener("pointerleave", () => pinned < 0 && !drag && show(-1));
  element.addEventListener("focus", () => pinned < 0 && show(node));
  element.addEventListener("blur", () => pinned < 0 && show(-1));
  element.addEventListener("keydown", (event) => onNodeKey(event, node));
});

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function onNodeKey(event, node) {
  if (event.key === "Enter" || event.key === " ") pin(pinned === node ? -1 : node);
  else if (event.key in STEPS) {
    const next = neighbour(node, STEPS[event.key]);
    if (next >= 0) {
      focusNode(next);
      bringIntoView(next);
      if (pinned >= 0) pin(next);
    }
  } else return;
  event.preventDefault();
}

function neighbour(node, [stepX, stepY]) {
  const here = data.nodes[node];
  let best = -1, least = Infinity;
  data.nodes.forEach((there, index) => {
    const dx = there.x - here.x, dy = there.y - here.y;
    const ahead = dx * stepX + dy * stepY, beside = Math.abs(dx * stepY + dy * stepX);
    if (ahead < 1 || (stepX && beside > 1)) return; // left and right stay in the row
    const distance = stepX ? ahead : ahead * 1000 + beside; // up and down take the next row first
    if (distance < least) [best, least] = [index, distance];
  });
  return best;
}

// ---- search ----------------------------------------------------------------------------------------------------------

function find() {
  const wanted = search.value.trim().toLowerCase();
  const matches = (node) => node.name.toLowerCase().includes(wanted) || node.readers.includes(wanted);
  hits = wanted ? data.nodes.flatMap((node, index) => (matches(node) ? [index] : [])) : [];
  nodeElements.forEach((element, index) => element.classList.toggle("hit", hits.includes(index)));
  byId("found").textContent = !wanted ? "" : hits.length === 1 ? "1 node" : `${hits.length || "no"} nodes`;
}

search.addEventListener("input", find);
search.addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  if (hits.length) select(hits[0]);
});

// ---- pan and zoom ----------------------------------------------------------------------------------------------------

const whole = { width: Number(drawing.dataset.width), height: Number(drawing.dataset.height) };
let view = { x: 0, y: 0, ...whole };
let drag = null;

function setView(x, y, width) {
  view = { x, y, width, height: (width * whole.height) / whole.width };
  drawing.setAttribute("viewBox", `${view.x} ${view.y} ${view.width} ${view.height}`);
}

function fit() {
  setView(-12, (-12 * whole.height) / whole.width, whole.width + 24);
}

function toDrawing(event) {
  return new DOMPoint(event.clientX, event.clientY).matrixTransform(drawing.getScreenCTM().inverse());
}

function zoom(factor, about = { x: view.x + view.width / 2, y: view.y + view.height / 2 }) {
  const width = Math.min(whole.width * 4, Math.max(whole.width / 40, view.width * factor));
  const by = width / view.width;
  setView(about.x - (about.x - view.x) * by, about.y - (about.y - view.y) * by, width);
}

/** Move to a node that is off the screen, and close enough to read its name. */
function bringIntoView(node) {
  const { x, y } = data.nodes[node], box = drawing.getBoundingClientRect();
  const scale = drawing.getScreenCTM().a;
  if (scale < 0.6) zoom(scale / 0.8);
  const at = new DOMPoint(x, y).matrixTransform(drawing.getScreenCTM());
  const edge = 40;
  const seen = at.x > box.left + edge && at.x < box.right - edge && at.y > box.top + edge && at.y < box.bottom - edge;
  if (!seen) setView(x - view.width / 2, y - view.height / 2, view.width);
}

drawing.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoom(Math.exp(Math.max(-50, Math.min(50, event.deltaY)) * 0.004), toDrawing(event));
}, { passive: false });
drawing.addEventListener("pointerdown", (event) => {
  if (event.button === 0) drag = { ...toDrawing(event).toJSON(), left: event.clientX, top: event.clientY, moved: false };
});
addEventListener("pointermove", (event) => {
  if (!drag) return;
  if (!drag.moved && Math.hypot(event.clientX - drag.left, event.clientY - drag.top) < 4) return;
  drag.moved = true;
  drawing.classList.add("dragging");
  const now = toDrawing(event);
  setView(view.x + drag.x - now.x, view.y + drag.y - now.y, view.width);
});
addEventListener("pointerup", (event) => {
  if (drag && !drag.moved) {
    const group = event.target.closest(".node");
    const node = group ? nodeElements.indexOf(group) : -1;
    pin(node === pinned ? -1 : node);
  }
  drag = null;
  drawing.classList.remove("dragging");
});
addEventListener("pointercancel", () => (drag = null));
byId("zoom-in").addEventListener("click", () => zoom(0.75));
byId("zoom-out").addEventListener("click", () => zoom(1 / 0.75));
byId("fit").addEventListener("click", fit);
addEventListener("keydown", (event) => {
  if (event.key === "Escape") pin(-1);
  if (event.target.matches("input, select") || event.ctrlKey || event.metaKey) return;
  if (event.key === "+" || event.key === "=") zoom(0.75);
  if (event.key === "-") zoom(1 / 0.75);
  if (event.key === "0") fit();
  if (event.key === "/") {
    event.preventDefault();
    search.focus();
  }
});

// ---- start -----------------------------------------------------------------------------------------------------------

function everything() {
  byId("to").selectedIndex = byId("to").options.length - 1;
  find();
  pinned = -1;
  applyFilters();
  fit();
}

byId("types").addEventListener("change", applyFilters);
byId("from").addEventListener("change", applyFilters);
byId("to").addEventListener("change", applyFilters);
byId("controls").addEventListener("submit", (event) => event.preventDefault());
byId("controls").addEventListener("reset", () => setTimeout(everything)); // once the form has its first values back
everything();
