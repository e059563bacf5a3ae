// Tokens with a colour each: as running text (saliency, contexts of a feature) or as a table (a lens, layers upwards; rows of
// numbers, downwards). What is selected is a flat list of row, token, row, token ...; cells with the same `key` go together.
// Token text is set as textContent, never as HTML.

const POLES = { light: { up: [33, 102, 172], down: [178, 24, 43] }, dark: { up: [95, 173, 234], down: [244, 132, 111] } };

function wash(mode, x) {  // x from -1 to 1
  const [r, g, b] = POLES[mode][x < 0 ? "down" : "up"];
  return `rgba(${r}, ${g}, ${b}, ${(0.85 * Math.min(1, Math.abs(x))).toFixed(3)})`;
}

function ramp(mode) {
  return `linear-gradient(to right, ${[-1, -0.5, 0, 0.5, 1].map((x) => wash(mode, x)).join(", ")})`;
}

function render({ model, el }) {
  const root = make("div", "wb-tokens"), head = make("div", "wb-tokens-head"), words = make("div", "");
  const legend = make("div", "wb-tokens-legend"), low = make("span", ""), bar = make("span", "wb-tokens-bar"), high = make("span", "");
  const unit = make("span", "wb-tokens-unit"), title = make("div", "wb-tokens-title"), sub = make("div", "wb-tokens-sub");
  const body = make("div", "wb-tokens-body"), read = make("div", "wb-tokens-read"), note = make("div", "wb-tokens-sub");
  read.setAttribute("aria-live", "polite");
  legend.append(low, bar, high, unit); words.append(title, sub); head.append(words, legend);
  root.append(head, body, read, note); el.append(root);
  let d, cells = [], focus = null;

  const key = (row, i) => d.rows[row].cells[i].key ?? `${row},${i}`;

  function chosen() {  // the keys of the selected cells
    const flat = model.get("selected"), keys = new Set();
    for (let k = 0; k + 1 < flat.length; k += 2) if (d.rows[flat[k]]?.cells[flat[k + 1]]) keys.add(key(flat[k], flat[k + 1]));
    return keys;
  }

  function cell(tag, row, i) {
    const one = d.rows[row].cells[i], node = make(tag, "wb-token", one.text);
    node.tabIndex = focus && focus[0] === row && focus[1] === i ? 0 : -1;
    node.title = one.tip;
    node.dataset.at = `${row},${i}`;
    node.addEventListener("pointerenter", () => { read.textContent = one.tip; });
    node.addEventListener("pointerleave", () => { say(); });
    node.addEventListener("click", (event) => { focus = [row, i]; pick(d.many && (event.ctrlKey || event.metaKey || event.shiftKey)); });
    node.addEventListener("focus", () => { focus = [row, i]; read.textContent = one.tip; });
    node.addEventListener("keydown", move);
    cells[row][i] = node;
    return node;
  }

  function pick(add) {
    const now = chosen(), mine = key(...focus), has = now.has(mine), next = new Set(add ? now : []);
    if (has && (add || now.size === 1)) next.delete(mine); else next.add(mine);
    const flat = [];
    for (const one of next) {
      if (d.many) d.rows.forEach((line, row) => line.cells.forEach((_, i) => { if (key(row, i) === one) flat.push(row, i); }));
      else flat.push(...focus);
    }
    model.set("selected", flat);
    model.save_changes();
    cells[focus[0]][focus[1]].focus({ preventScroll: true });
  }

  function move(event) {
    const up = d.table && !d.down ? 1 : -1;  // the layers of a table run upwards
    const step = { ArrowUp: [up, 0], ArrowDown: [-up, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!(step || ["Enter", " ", "Escape"].includes(event.key))) return;
    event.preventDefault(); event.stopPropagation();
    if (event.key === "Escape") { model.set("selected", []); model.save_changes(); return; }
    if (!step) { pick(d.many); return; }
    const row = Math.min(d.rows.length - 1, Math.max(0, focus[0] + step[0]));
    const i = Math.min(d.rows[row].cells.length - 1, Math.max(0, focus[1] + step[1]));
    cells[focus[0]][focus[1]].tabIndex = -1;
    cells[row][i].tabIndex = 0;
    cells[row][i].focus();
  }

  function load() {
    d = model.get("data");
    cells = d.rows.map(() => []);
    focus = d.rows.length ? [d.table && !d.down ? d.rows.length - 1 : 0, 0] : null;
    title.textContent = d.title; sub.textContent = d.subtitle; note.textContent = d.note;
    legend.hidden = !d.scale;
    if (d.scale) { low.textContent = d.scale.low; high.textContent = d.scale.high; unit.textContent = d.scale.unit; }
    body.replaceChildren();
    if (d.table) {
      const table = make("table", "wb-tokens-table");
      table.setAttribute("role", "grid"); table.setAttribute("aria-label", d.alt);
      const head = make("tr", "");
      head.append(make("th", "", d.corner), ...d.columns.map((text) => make("th", "", text)));
      if (d.down) table.append(head);
      table.classList.toggle("wb-numbers", Boolean(d.down));
      for (let k = 0; k < d.rows.length; k++) {
        const row = d.down ? k : d.rows.length - 1 - k;
        const line = make("tr", "");
        line.append(make("th", "", d.rows[row].name), ...d.rows[row].cells.map((_, i) => cell("td", row, i)));
        table.append(line);
      }
      if (!d.down) table.append(head);
      body.append(table);
    } else {
      d.rows.forEach((one, row) => {
        const line = make("div", "wb-tokens-line"), text = make("div", "wb-tokens-text");
        line.setAttribute("role", "group"); line.setAttribute("aria-label", `${one.name} ${d.alt}`);
        one.cells.forEach((_, i) => text.append(cell("span", row, i), document.createTextNode(" ")));
        line.append(make("div", "wb-tokens-name", one.name), text);
        body.append(line);
      });
    }
    draw();
  }

  function say() {
    const now = model.get("selected"), at = now.length ? d.rows[now[0]]?.cells[now[1]] : null;
    const add = d.many ? "; with ctrl or shift it adds. Arrow keys move, Enter adds or removes." : ". Arrow keys move, Enter selects.";
    read.textContent = at ? at.tip : d.fixed ? "" : `Point at a ${d.down ? "cell" : "token"} to read it; click selects${add}`;
  }

  function draw() {
    const mode = isDark(el) ? "dark" : "light", now = chosen();
    root.classList.toggle("wb-dark", mode === "dark");
    bar.style.background = ramp(mode);
    d.rows.forEach((one, row) => one.cells.forEach((token, i) => {
      const node = cells[row][i];
      node.style.background = wash(mode, token.faint ? 0.4 * token.value : token.value);
      node.classList.toggle("wb-faint", Boolean(token.faint));
      node.classList.toggle("wb-strong", !token.faint && Math.abs(token.value) > 0.68);
      node.classList.toggle("wb-marked", Boolean(token.marked));
      node.classList.toggle("wb-chosen", now.has(key(row, i)));
      node.setAttribute("aria-selected", String(now.has(key(row, i))));
    }));
    say();
  }

  model.on("change:data", load);
  model.on("change:selected", draw);
  load();
  const stop = onTheme(el, draw);
  requestAnimationFrame(draw);  // once attached, what is behind the view is known
  return () => { stop(); model.off("change:data", load); model.off("change:selected", draw); };
}

export default { render };
