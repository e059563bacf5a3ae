// Shared by the scripts of all views, and put before each of them.

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
