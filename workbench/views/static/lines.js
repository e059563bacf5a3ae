// How does a number grow along an axis? Lines with their bands and baselines; point to read, click to select a place.
// Text is set as textContent, never as HTML.

const TONES = {
  light: { blue: "#2166ac", orange: "#c77700", red: "#b2182b", grey: "#7d8590", quiet: "#5f6774", ink: "#222831", line: "#e3e6ea", paper: "#ffffff", ring: "#e08a00" },
  dark: { blue: "#5fadea", orange: "#ffb84d", red: "#f4846f", grey: "#8d96a2", quiet: "#a4abb6", ink: "#e6e8eb", line: "#343a43", paper: "#15181c", ring: "#ffb000" },
};
const HINT = "Point at a place to read it. Click selects; with ctrl or shift it adds. Left and right move, Enter adds or removes.";
const NS = "http://www.w3.org/2000/svg";

function svg(tag, about, text) {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(about)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function mark(kind, x, y, tone, about = {}) {
  if (kind === "s") return svg("rect", { x: x - 3.2, y: y - 3.2, width: 6.4, height: 6.4, fill: tone, ...about });
  if (kind === "^") return svg("path", { d: `M${x} ${y - 4.4}l4 7h-8z`, fill: tone, ...about });
  if (kind === "x") return svg("path", { d: `M${x - 3.2} ${y - 3.2}l6.4 6.4m0 -6.4l-6.4 6.4`, stroke: tone, "stroke-width": 1.8, fill: "none", ...about });
  return svg("circle", { cx: x, cy: y, r: 3.8, fill: tone, ...about });
}

function steps(low, high, most) {  // round numbers from low to high
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((x) => x * power).find((x) => x >= rough - 1e-12), found = [];
  for (let y = Math.ceil(low / step - 1e-9) * step; y <= high + 1e-9; y += step) found.push(Number(y.toPrecision(10)));
  return found;
}

function render({ model, el }) {
  const root = make("div", "wb-lines"), title = make("div", "wb-lines-title"), sub = make("div", "wb-lines-sub");
  const field = make("div", "wb-lines-field"), key = make("div", "wb-lines-key"), read = make("div", "wb-lines-read"), note = make("div", "wb-lines-sub");
  const spoken = make("div", "wb-unseen");
  spoken.setAttribute("aria-live", "polite");
  field.tabIndex = 0; field.setAttribute("role", "application");
  root.append(title, sub, field, key, read, note, spoken); el.append(root);
  let d, picture, box, hover = -1, focus = 0, focused = false;

  function load() {
    d = model.get("data");
    focus = Math.min(Math.max(0, focus), d.names.length - 1); hover = -1;
    title.textContent = d.title; sub.textContent = d.subtitle; note.textContent = d.note;
    field.setAttribute("aria-label", d.alt);
    draw();
  }

  function scale() {
    const width = Math.max(240, Math.min(root.clientWidth || 620, d.widest || 680)), height = d.height || 270;
    const left = 46, right = width - 14, top = 10, bottom = height - 40, place = (x) => (d.log ? Math.log10(Math.max(x, 0.5)) : x);
    const at = (d.at || d.names.map((_, i) => i)).map(place), first = Math.min(...at), last = Math.max(...at), room = last - first || 1;
    const pad = d.log ? 0 : Math.min(24, (right - left) / (2 * at.length)), [low, high] = d.ylim;
    const along = (x) => (last === first ? (left + right) / 2 : left + pad + ((place(x) - first) / room) * (right - left - 2 * pad));
    return { width, height, left, right, top, bottom, along, x: (d.at || d.names.map((_, i) => i)).map(along), y: (v) => bottom - ((Math.min(high, Math.max(low, v)) - low) / (high - low)) * (bottom - top) };
  }

  function draw() {
    const mode = isDark(el) ? "dark" : "light", tone = TONES[mode], chosen = model.get("selected");
    root.classList.toggle("wb-dark", mode === "dark");
    box = scale();
    const { width, height, left, right, top, bottom, x, y } = box;
    picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    picture.style.pointerEvents = "none";  // drawn anew while pressed, a target that is gone would swallow the click
    picture.dataset.geometry = JSON.stringify({ x, top, bottom });
    for (const v of steps(...d.ylim, 5)) {
      picture.append(svg("line", { x1: left, x2: right, y1: y(v), y2: y(v), stroke: tone.line }));
      picture.append(svg("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end", fill: tone.ink }, String(v).replace("-", "\u2212")));
    }
    let free = -Infinity;
    d.labels.forEach((text, i) => {
      const half = 3.6 * text.length;
      if (x[i] - half < free + 6) return;
      free = x[i] + half;
      picture.append(svg("text", { x: x[i], y: bottom + 16, "text-anchor": "middle", fill: tone.ink }, text));
    });
    picture.append(svg("text", { x: (left + right) / 2, y: bottom + 33, "text-anchor": "middle", fill: tone.quiet }, d.xlabel));
    picture.append(svg("text", { transform: `translate(11 ${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle", fill: tone.quiet }, d.ylabel));
    d.series.forEach((one) => series(one, tone));
    if (d.mark !== null && d.mark !== undefined) {
      const at = box.along(d.mark);
      picture.append(svg("line", { x1: at, x2: at, y1: top, y2: bottom, stroke: tone.ring, "stroke-width": 2, "stroke-dasharray": "5 3", class: "wb-lines-now" }));
    }
    const ring = (i, stroke, dash) => {
      picture.append(svg("line", { x1: x[i], x2: x[i], y1: top, y2: bottom, stroke, "stroke-width": 1, "stroke-dasharray": dash }));
      for (const one of d.series.filter((s) => s.main && s.y[i] !== null)) picture.append(svg("circle", { cx: x[i], cy: y(one.y[i]), r: 7, fill: "none", stroke, "stroke-width": 2.4, "stroke-dasharray": dash }));
    };
    chosen.forEach((i) => { if (i < x.length) ring(i, tone.ring, "none"); });
    if (hover >= 0) ring(hover, tone.ink, "3 3"); else if (focused) ring(focus, tone.ink, "4 3");
    field.replaceChildren(picture);
    legend(tone);
    const said = hover >= 0 ? hover : focused ? focus : chosen.length ? chosen[chosen.length - 1] : -1;
    read.textContent = said >= 0 ? d.tips[said] : d.hint ?? HINT;
  }

  function series(one, tone) {
    const { x, y, bottom } = box, known = x.map((_, i) => i).filter((i) => one.y[i] !== null), stroke = tone[one.tone];
    const path = (values, list) => list.map((i, k) => `${k ? "L" : "M"}${x[i].toFixed(1)} ${y(values[i]).toFixed(1)}`).join("");
    if (!known.length) return;
    if (one.area) {
      const ends = `L${x[known[known.length - 1]]} ${bottom}L${x[known[0]]} ${bottom}Z`;
      picture.append(svg("path", { d: path(one.y, known) + ends, fill: stroke, opacity: 0.22 }));
      return;
    }
    if (one.lo) {
      const both = known.filter((i) => one.lo[i] !== null && one.hi[i] !== null);
      if (both.length) picture.append(svg("path", { d: `${path(one.hi, both)}${path(one.lo, both.slice().reverse()).replace("M", "L")}Z`, fill: stroke, opacity: 0.2 }));
    }
    picture.append(svg("path", { d: path(one.y, known), fill: "none", stroke, "stroke-width": one.main ? 2.2 : 1.5, "stroke-dasharray": one.dash || "none", opacity: one.opacity ?? 1 }));
    if (one.marker) known.forEach((i) => picture.append(mark(one.marker, x[i], y(one.y[i]), stroke)));
  }

  function legend(tone) {
    const named = d.series.filter((one) => one.label).sort((a, b) => Boolean(b.main) - Boolean(a.main));  // drawn last, named first
    key.replaceChildren(...named.map((one) => {
      const item = make("span", "wb-lines-item"), sample = svg("svg", { width: 30, height: 12, "aria-hidden": "true" }), stroke = tone[one.tone];
      if (one.area) sample.append(svg("rect", { x: 0, y: 1, width: 30, height: 10, fill: stroke, opacity: 0.3 }));
      else sample.append(svg("line", { x1: 0, x2: 30, y1: 6, y2: 6, stroke, "stroke-width": one.main ? 2.2 : 1.5, "stroke-dasharray": one.dash || "none" }), ...(one.marker ? [mark(one.marker, 15, 6, stroke)] : []));
      item.append(sample, document.createTextNode(one.label));
      return item;
    }));
  }

  function under(event) {
    const at = event.clientX - picture.getBoundingClientRect().left;
    return box.x.reduce((best, x, i) => (Math.abs(x - at) < Math.abs(box.x[best] - at) ? i : best), 0);
  }

  function choose(i, add) {
    const now = model.get("selected"), has = now.includes(i);
    model.set("selected", add && !d.single ? (has ? now.filter((j) => j !== i) : [...now, i]) : has && now.length === 1 ? [] : [i]);
    model.save_changes();
  }

  field.addEventListener("pointermove", (event) => { const i = under(event); if (i !== hover) { hover = i; draw(); } });
  field.addEventListener("pointerleave", () => { hover = -1; draw(); });
  field.addEventListener("click", (event) => { focus = under(event); field.focus({ preventScroll: true }); choose(focus, event.ctrlKey || event.metaKey || event.shiftKey); });
  keyboard(model, field, { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }, {
    look: (now) => { focused = now; },
    move: (step) => { focus = Math.min(d.names.length - 1, Math.max(0, focus + step)); spoken.textContent = d.tips[focus]; },
    choose: () => choose(focus, true),
    key: () => { hover = -1; },
  }, draw);

  return live(model, el, root, load, draw);
}

export default { render };
