// Which components matter? Scores as cells to point at and click. Rows run upwards, as the stream does.
// Token text is drawn with fillText or set as textContent, never as HTML.

const RAMP = {
  light: ["#67001f", "#b2182b", "#d6604d", "#f4a582", "#fddbc7", "#f7f7f7", "#d1e5f0", "#92c5de", "#4393c3", "#2166ac", "#053061"],
  dark: ["#ffc2b0", "#f4846f", "#d15a50", "#96403f", "#54312f", "#2b3037", "#263f55", "#28597f", "#2f7dba", "#5fadea", "#b3daff"],
};
const INK = { light: "#222831", dark: "#e6e8eb" };
const QUIET = { light: "#5f6774", dark: "#a4abb6" };
const PAPER = { light: "#ffffff", dark: "#15181c" };
const RING = { light: "#e08a00", dark: "#ffb000" };  // orange: neither of the two poles, for any eyes
const HINT = "Point at a cell to read it. Click selects; with ctrl or shift it adds. Arrow keys move, Enter adds or removes.";

const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

function mix(a, b, t) { return a.map((x, i) => Math.round(x + (b[i] - x) * t)); }

function colour(ramp, x) {  // x from -1 to 1
  const at = Math.min(1, Math.max(0, (x + 1) / 2)) * (ramp.length - 1);
  const i = Math.min(ramp.length - 2, Math.floor(at));
  return mix(rgb(ramp[i]), rgb(ramp[i + 1]), at - i);
}

function luminance([r, g, b]) { return (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255; }

function digits(limit) { return limit >= 100 ? 0 : limit >= 10 ? 1 : limit >= 0.1 ? 2 : Math.min(6, 2 - Math.floor(Math.log10(limit))); }

function signed(x, n) { return x === null ? "not scored" : (x < 0 && Number(Math.abs(x).toFixed(n)) ? "\u2212" : "+") + Math.abs(x).toFixed(n); }

function describe(d, k) {
  const n = digits(d.limit) + 1;
  const parts = [`${d.names[k]}${d.tokens[k] ? `  "${d.tokens[k]}"` : ""}`, `score ${signed(d.score[k], n)}`];
  parts.push(d.lo[k] === null ? "no interval" : `95 % interval [${signed(d.lo[k], n)}, ${signed(d.hi[k], n)}]`);
  parts.push(d.null[k] === null ? "no null" : `null p95 ${d.null[k].toFixed(n)}${d.faint[k] ? ", within the null" : ""}`);
  return parts.join("    ");
}

function measure(ctx, d, room) {  // sizes in CSS pixels
  ctx.font = `12px ${FONT}`;
  const wide = (texts) => Math.max(...texts.map((t) => ctx.measureText(t).width));
  const left = Math.ceil(wide(d.rows)) + 30;
  const cw = Math.floor(Math.max(4, Math.min(d.wide ? 64 : 46, (room - left - 6) / d.columns.length)));
  const ch = Math.floor(Math.max(6, Math.min(30, 440 / d.rows.length)));
  const longest = wide(d.columns);
  const turned = longest > cw - 4 && !d.columns.every((text) => /^-?\d+$/.test(text));
  const foot = (turned ? Math.min(96, Math.ceil(longest * 0.77) + 12) : 18) + 18;
  const spill = turned ? 0 : 4;
  return { left, cw, ch, top: 3, foot, turned, longest, width: left + cw * d.columns.length + spill + 3, height: 3 + ch * d.rows.length + foot };
}

function render({ model, el }) {
  const root = make("div", "wb-grid");
  const head = make("div", "wb-grid-head"), words = make("div", "");
  const title = make("div", "wb-grid-title"), sub = make("div", "wb-grid-sub");
  const legend = make("div", "wb-grid-legend"), low = make("span", ""), bar = make("span", "wb-grid-bar"), high = make("span", "");
  const unit = make("span", "wb-grid-unit");
  const field = make("div", "wb-grid-field"), canvas = document.createElement("canvas");
  const row = make("div", "wb-unseen"), cell = make("div", "");
  const read = make("div", "wb-grid-read"), note = make("div", "wb-grid-note");
  words.append(title, sub); legend.append(low, bar, high, unit); head.append(words, legend);
  cell.id = `wb-cell-${Math.random().toString(36).slice(2)}`;
  cell.setAttribute("role", "gridcell"); row.setAttribute("role", "row"); row.append(cell);
  canvas.setAttribute("aria-hidden", "true");
  field.append(canvas, row); root.append(head, field, read, note); el.append(root);
  field.tabIndex = 0;
  for (const [name, value] of Object.entries({ role: "grid", "aria-multiselectable": "true", "aria-activedescendant": cell.id })) field.setAttribute(name, value);

  let d, box, where, hover = -1, focus = -1, focused = false;
  const at = (r, c) => (r < 0 || c < 0 || r >= d.rows.length || c >= d.columns.length ? -1 : where[r * d.columns.length + c]);

  function load() {
    d = model.get("data");
    where = new Int32Array(d.rows.length * d.columns.length).fill(-1);
    d.names.forEach((_, k) => { where[d.row[k] * d.columns.length + d.column[k]] = k; });
    focus = d.names.length ? d.best : -1;
    hover = -1;
    title.textContent = d.title; sub.textContent = d.subtitle; unit.textContent = d.unit; note.textContent = d.note;
    low.textContent = signed(-d.limit, digits(d.limit)); high.textContent = signed(d.limit, digits(d.limit));
    field.setAttribute("aria-label", d.alt);
    field.setAttribute("aria-rowcount", d.rows.length); field.setAttribute("aria-colcount", d.columns.length);
    draw();
  }

  function draw() {
    const mode = isDark(el) ? "dark" : "light", ramp = RAMP[mode], ctx = canvas.getContext("2d");
    root.classList.toggle("wb-dark", mode === "dark");
    bar.style.background = `linear-gradient(to right, ${ramp.join(", ")})`;
    box = measure(ctx, d, Math.max(240, Math.min(root.clientWidth || 720, 940)));
    const scale = window.devicePixelRatio || 1, { left, cw, ch, top } = box, nr = d.rows.length, nc = d.columns.length;
    canvas.width = Math.round(box.width * scale); canvas.height = Math.round(box.height * scale);
    canvas.style.width = `${box.width}px`; canvas.style.height = `${box.height}px`;
    canvas.dataset.geometry = JSON.stringify({ left, top, cw, ch, rows: nr, columns: nc });
    ctx.setTransform(scale, 0, 0, scale, 0, 0);
    ctx.clearRect(0, 0, box.width, box.height);
    const gap = cw >= 8 && ch >= 8 ? 1 : 0, paper = rgb(PAPER[mode]), n = digits(d.limit);
    const x = (k) => left + d.column[k] * cw, y = (k) => top + (nr - 1 - d.row[k]) * ch;
    ctx.textAlign = "center"; ctx.textBaseline = "middle";
    d.names.forEach((_, k) => {
      const faint = d.faint[k], value = d.score[k];
      let fill = colour(ramp, value === null ? 0 : value / d.limit);
      if (faint) fill = mix(fill, paper, 0.55);
      ctx.fillStyle = `rgb(${fill.join(",")})`;
      ctx.fillRect(x(k), y(k), cw - gap, ch - gap);
      const ink = luminance(fill) > 0.45 ? INK.light : "#ffffff";
      ctx.fillStyle = ink;
      if (faint && cw >= 8 && ch >= 8) { ctx.globalAlpha = 0.5; ctx.beginPath(); ctx.arc(x(k) + cw / 2, y(k) + ch / 2, 1.3, 0, 7); ctx.fill(); ctx.globalAlpha = 1; }
      else if (value && Number(value.toFixed(n)) && cw >= 36 && ch >= 17) { ctx.font = `11px ${FONT}`; ctx.fillText(signed(value, n), x(k) + (cw - gap) / 2, y(k) + ch / 2); }
    });
    labels(ctx, mode, x, y);
    const ring = (k, ink, width, dash = []) => {
      ctx.strokeStyle = ink; ctx.lineWidth = width; ctx.setLineDash(dash);
      ctx.strokeRect(x(k) + width / 2 - 1, y(k) + width / 2 - 1, cw - gap - width + 2, ch - gap - width + 2);
      ctx.setLineDash([]);
    };
    for (const k of model.get("selected")) { ring(k, PAPER[mode], 4); ring(k, RING[mode], 2.5); }
    if (hover >= 0) ring(hover, INK[mode], 1.5);
    if (focused && focus >= 0) ring(focus, INK[mode], 1.5, [4, 3]);
    say();
  }

  function labels(ctx, mode) {
    const { left, cw, ch, top, turned, longest } = box, nr = d.rows.length, nc = d.columns.length;
    ctx.font = `12px ${FONT}`; ctx.fillStyle = INK[mode];
    ctx.textAlign = "right";
    const every = Math.ceil(14 / ch);
    d.rows.forEach((text, r) => { if (r % every === 0) ctx.fillText(text, left - 6, top + (nr - 1 - r) * ch + ch / 2); });
    const step = Math.max(1, Math.ceil((turned ? 15 : longest + 6) / cw));
    d.columns.forEach((text, c) => {
      if (c % step) return;
      ctx.save();
      ctx.translate(left + c * cw + cw / 2, top + nr * ch + 9);
      if (turned) { ctx.rotate(-0.87); ctx.textAlign = "right"; } else ctx.textAlign = "center";
      ctx.fillText(turned && text.length > 18 ? `${text.slice(0, 17)}\u2026` : text, turned ? 2 : 0, turned ? -1 : 2);
      ctx.restore();
    });
    ctx.fillStyle = QUIET[mode]; ctx.textAlign = "center";
    ctx.fillText(d.across, left + (nc * cw) / 2, box.height - 8);
    ctx.save(); ctx.translate(9, top + (nr * ch) / 2); ctx.rotate(-Math.PI / 2); ctx.fillText(d.upward, 0, 0); ctx.restore();
  }

  function say() {
    const k = hover >= 0 ? hover : focused ? focus : -1, chosen = model.get("selected");
    read.textContent = k < 0 ? HINT : describe(d, k);
    if (focus < 0) return;
    cell.textContent = describe(d, focus);
    cell.setAttribute("aria-selected", String(chosen.includes(focus)));
    row.setAttribute("aria-rowindex", d.rows.length - d.row[focus]);
    cell.setAttribute("aria-colindex", d.column[focus] + 1);
  }

  function under(event) {
    const r = canvas.getBoundingClientRect();
    const c = Math.floor((event.clientX - r.left - box.left) / box.cw), up = Math.floor((event.clientY - r.top - box.top) / box.ch);
    return at(d.rows.length - 1 - up, c);
  }

  function choose(k, add) {
    const now = model.get("selected"), has = now.includes(k);
    const next = add ? (has ? now.filter((i) => i !== k) : [...now, k]) : has && now.length === 1 ? [] : [k];
    model.set("selected", next);
    model.save_changes();
  }

  canvas.addEventListener("pointermove", (event) => { const k = under(event); if (k !== hover) { hover = k; draw(); } });
  canvas.addEventListener("pointerleave", () => { hover = -1; draw(); });
  canvas.addEventListener("click", (event) => {
    const k = under(event);
    if (k < 0) return;
    focus = k;
    field.focus({ preventScroll: true });
    choose(k, event.ctrlKey || event.metaKey || event.shiftKey);
  });
  keyboard(model, field, { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }, {
    can: () => focus >= 0,
    look: (now) => { focused = now; },
    move: ([up, right]) => {  // over cells that were not scored, to the next one that was
      let r = d.row[focus] + up, c = d.column[focus] + right;
      while (r >= 0 && c >= 0 && r < d.rows.length && c < d.columns.length && at(r, c) < 0) { r += up; c += right; }
      if (at(r, c) >= 0) focus = at(r, c);
    },
    choose: () => choose(focus, true),
  }, draw);

  return live(model, el, root, load, draw);
}

export default { render };
