// Shared by the scripts of all views, and put before each of them.

const FONT = 'system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, "DejaVu Sans", sans-serif';

function make(tag, css, text = "") {
  const node = document.createElement(tag);
  node.className = css;
  node.textContent = text;
  return node;
}

function isDark(el) {  // what is really behind the view, in whichever front end
  for (let node = el; node; node = node.parentElement) {
    const [r, g, b, alpha = 1] = (getComputedStyle(node).backgroundColor.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number);
    if (alpha > 0.5) return 0.2126 * r + 0.7152 * g + 0.0722 * b < 128;
  }
  return window.matchMedia("(prefers-color-scheme: dark)").matches;
}

function onTheme(el, redraw) {  // returns the function that stops listening
  let timer;
  const later = () => { redraw(); clearTimeout(timer); timer = setTimeout(redraw, 400); };
  const watch = new MutationObserver(later);
  for (const node of [document.body, document.documentElement]) {
    watch.observe(node, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-jp-theme-name", "class", "theme", "style"] });
  }
  const media = window.matchMedia("(prefers-color-scheme: dark)");
  media.addEventListener("change", later);
  return () => { watch.disconnect(); media.removeEventListener("change", later); clearTimeout(timer); };
}

function live(model, el, root, load, draw) {  // drawn now and whenever something changes; returns the function that ends it
  let width = 0;
  const size = new ResizeObserver(() => { if (root.clientWidth !== width) { width = root.clientWidth; draw(); } });
  model.on("change:data", load);
  model.on("change:selected", draw);
  load();
  size.observe(root);
  const stop = onTheme(el, draw);
  return () => { stop(); size.disconnect(); model.off("change:data", load); model.off("change:selected", draw); };
}

// The keyboard in `field`: look(here) hears that it came or went, move(steps[key]) an arrow, choose() Enter or space; Escape
// clears. key() hears every one of these keys first, and where can() is false they are left alone.
function keyboard(model, field, steps, { look, move, choose, key = () => {}, can = () => true }, draw) {
  field.addEventListener("focus", () => { look(field.matches(":focus-visible")); draw(); });
  field.addEventListener("blur", () => { look(false); draw(); });
  field.addEventListener("keydown", (event) => {
    const step = steps[event.key];
    if (!can() || !(step || ["Enter", " ", "Escape"].includes(event.key))) return;
    event.preventDefault(); event.stopPropagation();
    look(true); key();
    if (step) move(step);
    else if (event.key === "Escape") { model.set("selected", []); model.save_changes(); }
    else choose();
    draw();
  });
}
