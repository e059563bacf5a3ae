// Where does each head look? Small patterns of all heads, layers upwards, and the chosen one large with its tokens.
// Token text is drawn with fillText or set as textContent, never as HTML.

const INK = { light: "#222831", dark: "#e6e8eb" };
const QUIET = { light: "#5f6774", dark: "#a4abb6" };
const PAPER = { light: [247, 248, 250], dark: [32, 36, 42] };
const FULL = { light: [8, 61, 119], dark: [130, 200, 255] };
const RING = { light: "#e08a00", dark: "#ffb000" };
const HINT = "Click a head to see it large; with ctrl or shift it is added to the selection. Arrow keys move, Enter adds or removes.";

function shade(mode, p) { return PAPER[mode].map((x, i) => Math.round(x + (FULL[mode][i] - x) * Math.sqrt(p))); }

function render({ model, el }) {
  const root = make("div", "wb-att"), title = make("div", "wb-att-title"), sub = make("div", "wb-att-sub");
  const both = make("div", "wb-att-both"), field = make("div", "wb-att-field"), small = document.createElement("canvas");
  const side = make("div", "wb-att-side"), name = make("div", "wb-att-name"), large = document.createElement("canvas");
  const read = make("div", "wb-att-read"), spoken = make("div", "wb-unseen");
  small.setAttribute("aria-hidden", "true"); large.setAttribute("role", "img");
  spoken.setAttribute("aria-live", "polite");
  field.tabIndex = 0; field.setAttribute("role", "application");
  field.append(small); side.append(name, large); both.append(field, side);
  root.append(title, sub, both, read, spoken); el.append(root);
  let d, bytes, mode, cell, focus = 0, focused = false, tiles = new Map();

  const value = (k, q, key) => bytes.getUint8((k * d.tokens.length + q) * d.tokens.length + key) / 255;

  function load() {
    d = model.get("data");
    bytes = model.get("patterns");
    tiles = new Map();
    focus = Math.min(focus, d.heads.length - 1);
    title.textContent = d.title; sub.textContent = d.subtitle; field.setAttribute("aria-label", d.alt);
    draw();
  }

  function tile(k) {  // one head as an image of one pixel per pair, made once
    if (!tiles.has(k)) {
      const n = d.tokens.length, picture = new OffscreenCanvas(n, n), data = new ImageData(n, n);
      for (let q = 0; q < n; q++) for (let key = 0; key < n; key++) {
        const [r, g, b] = shade(mode, key <= q ? value(k, q, key) : 0), i = 4 * (q * n + key);
        data.data.set([r, g, b, key <= q ? 255 : 0], i);
      }
      picture.getContext("2d").putImageData(data, 0, 0);
      tiles.set(k, picture);
    }
    return tiles.get(k);
  }

  function prepare(canvas, width, height) {
    const scale = window.devicePixelRatio || 1, ctx = canvas.getContext("2d");
    canvas.width = Math.round(width * scale); canvas.height = Math.round(height * scale);
    canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
    ctx.setTransform(scale, 0, 0, scale, 0, 0);
    ctx.clearRect(0, 0, width, height);
    ctx.imageSmoothingEnabled = false;
    return ctx;
  }

  function current() { const chosen = model.get("selected"); return chosen.length ? chosen[chosen.length - 1] : focus; }

  function draw() {
    const now = isDark(el) ? "dark" : "light";
    if (now !== mode) { mode = now; tiles = new Map(); }
    root.classList.toggle("wb-dark", mode === "dark");
    const room = Math.max(260, Math.min(root.clientWidth || 900, 960)), wide = room > 640 ? room * 0.52 : room;
    cell = Math.max(14, Math.min(54, Math.floor((wide - 34) / d.n_heads)));
    const left = 26, width = left + cell * d.n_heads + 4, height = cell * d.n_layers + 40;
    const ctx = prepare(small, width, height);
    small.dataset.geometry = JSON.stringify({ left, top: 2, cell, rows: d.n_layers, columns: d.n_heads });
    d.heads.forEach((_, k) => ctx.drawImage(tile(k), x(k), y(k), cell - 3, cell - 3));
    ctx.font = `12px ${FONT}`; ctx.fillStyle = INK[mode]; ctx.textBaseline = "middle";
    ctx.textAlign = "right";
    for (let layer = 0; layer < d.n_layers; layer++) ctx.fillText(layer, left - 6, 2 + (d.n_layers - 0.5 - layer) * cell);
    ctx.textAlign = "center";
    for (let head = 0; head < d.n_heads; head++) if (cell > 18 || head % 2 === 0) ctx.fillText(head, left + (head + 0.5) * cell - 1, cell * d.n_layers + 10);
    ctx.fillStyle = QUIET[mode];
    ctx.fillText("head (layers upwards)", left + (cell * d.n_heads) / 2, cell * d.n_layers + 28);
    const ring = (k, ink, line, dash = []) => { ctx.strokeStyle = ink; ctx.lineWidth = line; ctx.setLineDash(dash); ctx.strokeRect(x(k) - 1, y(k) - 1, cell - 1, cell - 1); ctx.setLineDash([]); };
    for (const k of model.get("selected")) ring(k, RING[mode], 2.5);
    if (focused) ring(focus, INK[mode], 1.5, [4, 3]);
    draw_large(current(), room > 640 ? room - width - 24 : room);
    if (!read.dataset.pointed) read.textContent = HINT;
  }

  function x(k) { return 26 + d.column[k] * cell; }
  function y(k) { return 2 + (d.n_layers - 1 - d.row[k]) * cell; }

  function draw_large(k, room) {
    const n = d.tokens.length, ctx0 = large.getContext("2d");
    ctx0.font = `12px ${FONT}`;
    const longest = Math.min(110, Math.ceil(Math.max(...d.tokens.map((t) => ctx0.measureText(t).width))) + 12);
    const step = Math.max(5, Math.min(24, Math.floor((room - longest - 8) / n)));
    const every = Math.ceil(13 / step), left = longest, top = longest * 0.8 + 6, width = left + step * n + 26, height = top + step * n + 4;
    const ctx = prepare(large, width, height);
    large.dataset.geometry = JSON.stringify({ left, top, step, n });
    large.setAttribute("aria-label", `pattern of ${d.heads[k]}: rows are the tokens that look, columns those looked at`);
    name.textContent = `${d.heads[k]}: rows look at columns`;
    ctx.drawImage(tile(k), left, top, step * n, step * n);
    ctx.font = `12px ${FONT}`; ctx.fillStyle = INK[mode]; ctx.textBaseline = "middle";
    d.tokens.forEach((token, i) => {
      if (i % every) return;
      const text = token.length > 14 ? `${token.slice(0, 13)}\u2026` : token;
      ctx.textAlign = "right"; ctx.fillText(text, left - 5, top + (i + 0.5) * step);
      ctx.save(); ctx.translate(left + (i + 0.5) * step, top - 5); ctx.rotate(-0.9); ctx.textAlign = "left"; ctx.fillText(text, 0, 0); ctx.restore();
    });
  }

  function choose(k, add) {
    const now = model.get("selected"), has = now.includes(k);
    model.set("selected", add ? (has ? now.filter((i) => i !== k) : [...now, k]) : [k]);
    model.save_changes();
  }

  function under(event) {
    const r = small.getBoundingClientRect(), c = Math.floor((event.clientX - r.left - 26) / cell), up = Math.floor((event.clientY - r.top - 2) / cell);
    const layer = d.n_layers - 1 - up;
    return d.row.findIndex((row, k) => row === layer && d.column[k] === c);
  }

  small.addEventListener("click", (event) => {
    const k = under(event);
    if (k < 0) return;
    focus = k; field.focus({ preventScroll: true });
    choose(k, event.ctrlKey || event.metaKey || event.shiftKey);
  });
  small.addEventListener("pointermove", (event) => { const k = under(event); read.dataset.pointed = k < 0 ? "" : "1"; read.textContent = k < 0 ? HINT : `${d.heads[k]}    ${d.notes[k]}`; });
  small.addEventListener("pointerleave", () => { read.dataset.pointed = ""; read.textContent = HINT; });
  large.addEventListener("pointermove", (event) => {
    const r = large.getBoundingClientRect(), { left, top, step, n } = JSON.parse(large.dataset.geometry), k = current();
    const q = Math.floor((event.clientY - r.top - top) / step), key = Math.floor((event.clientX - r.left - left) / step);
    const inside = q >= 0 && key >= 0 && q < n && key <= q;
    read.dataset.pointed = inside ? "1" : "";
    read.textContent = inside ? `${d.tokens[q]} (${q}) looks at ${d.tokens[key]} (${key}): ${value(k, q, key).toFixed(2)}` : HINT;
  });
  large.addEventListener("pointerleave", () => { read.dataset.pointed = ""; read.textContent = HINT; });
  keyboard(model, field, { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }, {
    look: (now) => { focused = now; },
    move: ([up, right]) => {
      focus = Math.min(d.heads.length - 1, Math.max(0, focus + up * d.n_heads + right));
      spoken.textContent = `${d.heads[focus]}, ${d.notes[focus]}`;
    },
    choose: () => choose(focus, true),
  }, draw);

  return live(model, el, root, load, draw);
}

export default { render };
