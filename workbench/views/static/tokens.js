// Tokens with a colour each: as running text (saliency, contexts of a feature) or as a table of layers by positions (a lens).
// Token text is set as textContent, never as HTML.

const POLES = { light: { up: [33, 102, 172], down: [178, 24, 43] }, dark: { up: [95, 173, 234], down: [244, 132, 111] } };

function wash(mode, x) {  // x from -1 to 1
  const [r, g, b] = POLES[mode][x < 0 ? "down" : "up"];
  return `rgba(${r}, ${g}, ${b}, ${(0.85 * Math.min(1, Math.abs(x))).toFixed(3)})`;
}

function render({ model, el }) {
  const root = make("div", "wb-tokens"), title = make("div", "wb-tokens-title"), sub = make("div", "wb-tokens-sub");
  const body = make("div", "wb-tokens-body"), read = make("div", "wb-tokens-read"), note = make("div", "wb-tokens-sub");
  read.setAttribute("aria-live", "polite");
  root.append(title, sub, body, read, note); el.append(root);
  let d, cells = [], focus = null;

  function cell(tag, row, i) {
    const one = d.rows[row].cells[i], node = make(tag, "wb-token", one.text);
    node.tabIndex = focus && focus[0] === row && focus[1] === i ? 0 : -1;
    node.title = one.tip;
    node.dataset.at = `${row},${i}`;
    node.addEventListener("pointerenter", () => { read.textContent = one.tip; });
    node.addEventListener("pointerleave", () => { say(); });
    node.addEventListener("click", () => { focus = [row, i]; pick(); });
    node.addEventListener("focus", () => { focus = [row, i]; read.textContent = one.tip; });
    node.addEventListener("keydown", move);
    cells[row][i] = node;
    return node;
  }

  function pick() {
    const now = model.get("selected");
    model.set("selected", now.length && now[0] === focus[0] && now[1] === focus[1] ? [] : [...focus]);
    model.save_changes();
    cells[focus[0]][focus[1]].focus({ preventScroll: true });
  }

  function move(event) {
    const up = d.table ? 1 : -1;  // the layers of a table run upwards
    const step = { ArrowUp: [up, 0], ArrowDown: [-up, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!(step || ["Enter", " ", "Escape"].includes(event.key))) return;
    event.preventDefault(); event.stopPropagation();
    if (event.key === "Escape") { model.set("selected", []); model.save_changes(); return; }
    if (!step) { pick(); return; }
    const row = Math.min(d.rows.length - 1, Math.max(0, focus[0] + step[0]));
    const i = Math.min(d.rows[row].cells.length - 1, Math.max(0, focus[1] + step[1]));
    cells[focus[0]][focus[1]].tabIndex = -1;
    cells[row][i].tabIndex = 0;
    cells[row][i].focus();
  }

  function load() {
    d = model.get("data");
    cells = d.rows.map(() => []);
    focus = d.rows.length ? [d.table ? d.rows.length - 1 : 0, 0] : null;
    title.textContent = d.title; sub.textContent = d.subtitle; note.textContent = d.note;
    body.replaceChildren();
    if (d.table) {
      const table = make("table", "wb-tokens-table");
      table.setAttribute("role", "grid"); table.setAttribute("aria-label", d.alt);
      const head = make("tr", "");
      head.append(make("th", "", d.corner), ...d.columns.map((text) => make("th", "", text)));
      for (let row = d.rows.length - 1; row >= 0; row--) {
        const line = make("tr", "");
        line.append(make("th", "", d.rows[row].name), ...d.rows[row].cells.map((_, i) => cell("td", row, i)));
        table.append(line);
      }
      table.append(head);
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
    const now = model.get("selected");
    read.textContent = now.length ? d.rows[now[0]].cells[now[1]].tip : "Point at a token to read it; click selects. Arrow keys move, Enter selects.";
  }

  function draw() {
    const mode = isDark(el) ? "dark" : "light", now = model.get("selected");
    root.classList.toggle("wb-dark", mode === "dark");
    d.rows.forEach((one, row) => one.cells.forEach((token, i) => {
      const node = cells[row][i];
      node.style.background = wash(mode, token.value);
      node.classList.toggle("wb-strong", Math.abs(token.value) > 0.68);
      node.classList.toggle("wb-marked", Boolean(token.marked));
      node.classList.toggle("wb-chosen", now[0] === row && now[1] === i);
      node.setAttribute("aria-selected", String(now[0] === row && now[1] === i));
    }));
    say();
  }

  model.on("change:data", load);
  model.on("change:selected", draw);
  load();
  const stop = onTheme(el, draw);
  return () => { stop(); model.off("change:data", load); model.off("change:selected", draw); };
}

export default { render };
