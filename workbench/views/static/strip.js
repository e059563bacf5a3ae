// What does the model say without and with the change, and what did it find likely next? Text is set as text only.

function line(row) {
  const whole = make("div", "wb-strip-line"), body = make("div", "wb-strip-body");
  whole.dataset.name = row.name;
  const prompt = make("span", "wb-prompt"), made = make("span", "wb-generated");
  row.prompt.forEach((token, i) => {
    const chip = make("span", token.steered ? "wb-steered" : "", token.text);
    chip.title = `position ${i} or ${i - row.prompt.length}${token.steered ? ", steered" : ""}`;
    prompt.append(chip);
  });
  for (const token of row.generated) made.append(make("span", token.steered ? "wb-steered" : "", token.text));
  body.append(prompt, make("span", "wb-strip-arrow", "\u2192"), made);
  whole.append(make("div", "wb-strip-name", row.name), body);
  whole.setAttribute("role", "group");
  whole.setAttribute("aria-label", `${row.name} the change`);
  return whole;
}

function share(p) { return p > 0 && p < 0.0005 ? "<0.001" : p.toFixed(3); }

function bars(data) {
  const whole = make("div", "wb-bars"), most = Math.max(...data.map((d) => Math.max(d.before, d.after)));
  whole.append(make("div", "wb-bars-title", "Next token"));
  for (const d of data) {
    const pair = make("div", "wb-bars-pair");
    for (const side of ["before", "after"]) {
      const bar = make("div", `wb-${side}`);
      bar.style.width = `${(100 * d[side]) / most}%`;
      pair.append(bar);
    }
    pair.setAttribute("aria-hidden", "true");
    const token = make("div", "wb-bars-token", d.token);
    token.title = d.token;
    whole.append(token, pair, make("div", "wb-bars-number", `${share(d.before)} \u2192 ${share(d.after)}`));
  }
  const key = make("div", "wb-bars-key");
  for (const [side, name] of [["before", "without"], ["after", "with"]]) {
    const item = make("span", ""), sample = make("i", `wb-${side}`);
    item.append(sample, document.createTextNode(name));
    key.append(item);
  }
  key.append(document.createTextNode("probability, from zero"));
  whole.append(key);
  return whole;
}

function render({ model, el }) {
  const root = make("div", "wb-strip");
  root.setAttribute("aria-live", "polite");
  el.append(root);
  function draw() {
    const { rows = [], bars: data = [], note = "" } = model.get("data");
    root.replaceChildren(...rows.map(line));
    if (data.length) root.append(bars(data));
    if (note) {
      const foot = make("div", "wb-strip-line"), text = make("div", "wb-strip-note"), sample = make("i", "wb-steered");
      text.append(sample, document.createTextNode(note));
      foot.append(make("div", ""), text);
      root.append(foot);
    }
  }
  const paint = () => root.classList.toggle("wb-dark", isDark(el));
  model.on("change:data", draw);
  const stop = onTheme(el, paint);
  draw();
  requestAnimationFrame(paint);
  return () => { stop(); model.off("change:data", draw); };
}

export default { render };
