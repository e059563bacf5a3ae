// Through which parts does it run? A circuit as a graph in layers, upwards, as the stream runs. Click a part to select it.
// Text is drawn with fillText or set as textContent, never as HTML.

const TONE = {
  light: { ink: "#222831", quiet: "#5f6774", line: "#dfe3e8", paper: "#ffffff", band: "#f5f7f9", up: "#2166ac", down: "#b2182b", ring: "#e08a00" },
  dark: { ink: "#e6e8eb", quiet: "#a4abb6", line: "#3a414b", paper: "#15181c", band: "#1c2026", up: "#5fadea", down: "#f4846f", ring: "#ffb000" },
};
const DASH = { q: [5, 3], k: [1.5, 2.5] };
const PORT = { q: -0.62, k: 0, v: 0.62 };  // where an edge enters a head, from left to right, in radii
const HINT = "Point at a part or an edge to read it. Click selects a part; with ctrl or shift it adds. Arrow keys move, Enter adds or removes.";

function signed(x) {
  if (x === null) return "not scored";
  const size = Math.abs(x), text = size >= 100 ? size.toFixed(0) : size >= 0.01 || !size ? size.toPrecision(3) : size.toExponential(1);
  return (x < 0 ? "\u2212" : "+") + text;
}

function render({ model, el }) {
  const root = make("div", "wb-graph"), title = make("div", "wb-graph-title"), sub = make("div", "wb-graph-sub");
  const field = make("div", "wb-graph-field"), canvas = document.createElement("canvas"), spoken = make("div", "wb-unseen");
  const read = make("div", "wb-graph-read"), key = make("div", "wb-graph-key"), note = make("div", "wb-graph-sub");
  canvas.setAttribute("aria-hidden", "true"); spoken.setAttribute("aria-live", "polite");
  field.tabIndex = 0; field.setAttribute("role", "application"); field.append(canvas);
  root.append(title, sub, field, read, key, note, spoken); el.append(root);
  let d, box, used, paths = [], hover = null, focus = 0, focused = false;

  function load() {
    d = model.get("data");
    used = new Set(d.edges.flatMap((edge) => [edge[0], edge[1]]));
    if (!used.has(focus)) focus = used.size ? Math.max(...used) : 0;
    hover = null;
    title.textContent = d.title; sub.textContent = d.subtitle; note.textContent = d.note;
    field.setAttribute("aria-label", d.alt);
    draw();
  }

  function measure() {
    const room = Math.max(240, Math.min(root.clientWidth || 560, 900)), left = 58, right = 34;
    const columns = Math.max(1, d.right), step = Math.min(76, (room - left - right) / columns);
    const r = Math.max(6, Math.min(12.5, step * 0.36)), rows = Math.max(1, d.top), up = Math.max(2.2 * r + 4, Math.min(44, 620 / rows));
    const width = left + step * columns + right, height = 2 * (r + 6) + rows * up;
    return { left, r, step, up, width, height, x: (n) => left + (n.x + 0.5) * step, y: (n) => height - r - 6 - n.y * up };
  }

  function route([source, target, kind]) {
    const a = d.nodes[source], b = d.nodes[target], { r, step } = box;
    const x0 = box.x(a), y0 = box.y(a) - r, x1 = box.x(b) + (PORT[kind] ?? 0) * r, y1 = box.y(b) + r * (PORT[kind] ? 0.8 : 1), path = new Path2D();
    const rise = Math.max(9, (y0 - y1) * 0.45), long = b.y - a.y > 3, bow = long ? (x0 >= x1 ? 1 : -1) * Math.min(step * 0.45, 26) : 0;
    path.moveTo(x0, y0);
    path.bezierCurveTo(x0 + bow, y0 - rise, x1 + bow, y1 + rise, x1, y1);
    return path;
  }

  function lit() {  // the parts whose edges stand out
    if (hover && hover.node !== undefined) return new Set([hover.node]);
    if (focused && !hover) return new Set([focus]);
    return new Set(model.get("selected").filter((i) => used.has(i)));
  }

  function draw() {
    const mode = isDark(el) ? "dark" : "light", tone = TONE[mode], scale = window.devicePixelRatio || 1, ctx = canvas.getContext("2d");
    root.classList.toggle("wb-dark", mode === "dark");
    box = measure();
    const { width, height, r, up, left } = box;
    canvas.width = Math.round(width * scale); canvas.height = Math.round(height * scale);
    canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
    ctx.setTransform(scale, 0, 0, scale, 0, 0);
    ctx.clearRect(0, 0, width, height);
    ctx.textBaseline = "middle"; ctx.font = `12px ${FONT}`;
    d.layers.forEach((layer, i) => {
      const y0 = height - r - 6 - (layer.to + 0.5) * up, y1 = height - r - 6 - (layer.from - 0.5) * up;
      if (i % 2 === 0) { ctx.fillStyle = tone.band; ctx.fillRect(0, y0, width, y1 - y0); }
      ctx.fillStyle = tone.quiet; ctx.textAlign = "left"; ctx.fillText(layer.label, 6, (y0 + y1) / 2);
    });
    const shown = lit(), limit = d.limit || 1;
    paths = d.edges.map(route);
    for (let k = d.edges.length - 1; k >= 0; k--) {  // the strongest come last, on top
      const [source, target, kind, score, , , , faint] = d.edges[k], share = Math.sqrt(Math.min(1, Math.abs(score) / limit));
      const mine = shown.has(source) || shown.has(target) || (hover && hover.edge === k);
      ctx.strokeStyle = score < 0 ? tone.down : tone.up;
      ctx.lineWidth = 0.6 + 3.6 * share + (hover && hover.edge === k ? 1.5 : 0);
      ctx.globalAlpha = (shown.size || (hover && hover.edge !== undefined)) && !mine ? 0.09 : mine ? 0.95 : faint ? 0.18 : 0.25 + 0.65 * share;
      ctx.setLineDash(DASH[kind] || []);
      ctx.stroke(paths[k]);
    }
    ctx.globalAlpha = 1; ctx.setLineDash([]);
    d.nodes.forEach((node, i) => part(ctx, tone, node, i));
    canvas.dataset.geometry = JSON.stringify({ r, nodes: d.nodes.map((n) => [box.x(n), box.y(n)]) });
    legend(tone, mode);
    say();
  }

  function part(ctx, tone, node, i) {
    const x = box.x(node), y = box.y(node), { r } = box, chosen = model.get("selected").includes(i);
    if (!used.has(i) && !chosen && !(focused && focus === i)) {
      ctx.fillStyle = tone.line; ctx.beginPath(); ctx.arc(x, y, 2.5, 0, 7); ctx.fill();
      return;
    }
    const outline = () => {
      ctx.beginPath();
      if (node.kind === "z") ctx.arc(x, y, r, 0, 7);
      else if (node.kind === "mlp_out") ctx.roundRect(x - r, y - r * 0.85, 2 * r, 1.7 * r, 3);
      else if (node.kind === "feature") {
        const h = r * 0.85, tip = h * 0.58;
        for (const [dx, dy] of [[-wide, 0], [tip - wide, -h], [wide - tip, -h], [wide, 0], [wide - tip, h], [tip - wide, h]]) ctx.lineTo(x + dx, y + dy);
        ctx.closePath();
      }
      else ctx.roundRect(x - wide, y - r * 0.85, 2 * wide, 1.7 * r, r);
    };
    ctx.font = `${Math.max(9, Math.min(11.5, r * 0.85))}px ${FONT}`;
    const wide = Math.max(r, ctx.measureText(node.label).width / 2 + (node.kind === "feature" ? 7.5 : 9));
    outline(); ctx.fillStyle = tone.paper; ctx.fill();
    ctx.strokeStyle = chosen ? tone.ring : tone.ink; ctx.lineWidth = chosen ? 3 : hover && hover.node === i ? 2 : 1.1;
    ctx.setLineDash(node.kind === "feature" && node.fixed ? [3, 2] : []);  // what the features leave over
    ctx.stroke(); ctx.setLineDash([]);
    if (focused && focus === i) { ctx.setLineDash([3, 2]); ctx.strokeStyle = tone.ink; ctx.lineWidth = 1.5; ctx.strokeRect(x - wide - 4, y - r - 3, 2 * wide + 8, 2 * r + 6); ctx.setLineDash([]); }
    ctx.fillStyle = tone.ink; ctx.textAlign = "center";
    if (r >= 8 || !["z", "mlp_out"].includes(node.kind)) ctx.fillText(node.label, x, y + 0.5);
  }

  function legend(tone, mode) {
    if (key.dataset.mode === mode + d.split) return;
    key.dataset.mode = mode + d.split;
    const sample = (text, stroke, dash, width = 2.4) => {
      const item = make("span", "wb-graph-item"), line = document.createElement("canvas"), ctx = line.getContext("2d");
      line.width = 64; line.height = 16; line.style.width = "32px"; line.style.height = "8px";
      ctx.scale(2, 2); ctx.strokeStyle = stroke; ctx.lineWidth = width; ctx.setLineDash(dash);
      ctx.beginPath(); ctx.moveTo(0, 4); ctx.lineTo(32, 4); ctx.stroke();
      item.append(line, document.createTextNode(text));
      return item;
    };
    const ways = d.split ? [sample("into a value", tone.quiet, []), sample("into a query", tone.quiet, DASH.q), sample("into a key", tone.quiet, DASH.k)] : [];
    key.replaceChildren(sample("helps", tone.up, []), sample("hurts", tone.down, []), sample("weak", tone.quiet, [], 0.8), sample("strong", tone.quiet, [], 4.2), ...ways);
  }

  function about(i) {
    const node = d.nodes[i], into = d.edges.filter((edge) => edge[1] === i), out = d.edges.filter((edge) => edge[0] === i);
    const best = (list, end) => (list.length ? `, strongest ${d.nodes[list[0][end]].name} ${signed(list[0][3])}` : "");
    return `${node.name}    ${into.length} edges in${best(into, 0)}    ${out.length} out${best(out, 1)}`;
  }

  function wording(k) {
    const [source, target, kind, score, lo, hi, bound, faint] = d.edges[k], reader = PORT[kind] === undefined ? d.nodes[target].name : d.nodes[target].name.replace("z", kind);
    const spread = lo === null ? "" : `    95 % interval [${signed(lo)}, ${signed(hi)}]`;
    return `${d.nodes[source].name} \u2192 ${reader}    score ${signed(score)}${spread}${bound === null ? "" : `    null p95 ${signed(bound).slice(1)}${faint ? ", within the null" : ""}`}`;
  }

  function say() {
    const chosen = model.get("selected"), last = chosen[chosen.length - 1];
    if (hover && hover.edge !== undefined) read.textContent = wording(hover.edge);
    else {
      const i = hover ? hover.node : focused ? focus : last;
      read.textContent = i === undefined ? HINT : about(i);
    }
  }

  function under(event) {
    const at = canvas.getBoundingClientRect(), x = event.clientX - at.left, y = event.clientY - at.top, ctx = canvas.getContext("2d");
    const node = d.nodes.findIndex((n, i) => used.has(i) && Math.hypot(box.x(n) - x, box.y(n) - y) <= Math.max(box.r, 9) + 2);
    if (node >= 0) return { node };
    const scale = window.devicePixelRatio || 1;
    ctx.lineWidth = 9;
    for (let k = 0; k < paths.length; k++) if (ctx.isPointInStroke(paths[k], x * scale, y * scale)) return { edge: k };
    return null;
  }

  function choose(i, add) {
    if (d.nodes[i].fixed) return;
    const now = model.get("selected"), has = now.includes(i);
    model.set("selected", add ? (has ? now.filter((j) => j !== i) : [...now, i]) : has && now.length === 1 ? [] : [i]);
    model.save_changes();
  }

  function walk(dx, dy) {  // the nearest part of the circuit in this direction
    const here = d.nodes[focus], inside = [...used].map((i) => [i, d.nodes[i]]);
    if (dx) {
      const row = inside.filter(([, n]) => n.y === here.y && (n.x - here.x) * dx > 0).sort((a, b) => (a[1].x - b[1].x) * dx);
      return row.length ? row[0][0] : focus;
    }
    const rows = inside.filter(([, n]) => (n.y - here.y) * dy > 0);
    if (!rows.length) return focus;
    const next = dy > 0 ? Math.min(...rows.map(([, n]) => n.y)) : Math.max(...rows.map(([, n]) => n.y));
    return rows.filter(([, n]) => n.y === next).sort((a, b) => Math.abs(a[1].x - here.x) - Math.abs(b[1].x - here.x))[0][0];
  }

  canvas.addEventListener("pointermove", (event) => {
    const now = under(event);
    if (now?.node === hover?.node && now?.edge === hover?.edge) return;
    hover = now; canvas.style.cursor = now && now.node !== undefined ? "pointer" : "default"; draw();
  });
  canvas.addEventListener("pointerleave", () => { hover = null; draw(); });
  canvas.addEventListener("click", (event) => {
    const found = under(event);
    field.focus({ preventScroll: true });
    if (found && found.node !== undefined) { focus = found.node; spoken.textContent = about(focus); choose(focus, event.ctrlKey || event.metaKey || event.shiftKey); }
  });
  keyboard(model, field, { ArrowUp: [0, 1], ArrowDown: [0, -1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }, {
    look: (now) => { focused = now; },
    move: (step) => { focus = walk(...step); spoken.textContent = about(focus); },
    choose: () => { if (used.has(focus)) choose(focus, true); },
    key: () => { hover = null; },
  }, draw);

  return live(model, el, root, load, draw);
}

export default { render };
