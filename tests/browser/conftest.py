"""JupyterLab on a free port, and Debian's chromium to open it with. Without a browser these tests are skipped, but
where CI=true they fail, so that a pipeline cannot lose them."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest

from workbench.views.view import script

ROOT = Path(__file__).parents[2]
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
SETTINGS = {
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


def missing(sentence: str):
    if os.environ.get("CI") == "true":
        pytest.fail(f"{sentence} CI=true demands the browser tests.")
    pytest.skip(sentence)


@pytest.fixture(scope="session")
def chromium():
    """A browser, started once."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("Playwright is not installed: pip install playwright.")
    path = os.environ.get("WORKBENCH_CHROMIUM") or shutil.which("chromium")
    if not path:
        missing("No browser: install Debian's chromium, or name one in WORKBENCH_CHROMIUM.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """An empty page; an error in a script fails the test, and so does a request that leaves the machine."""
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(30_000)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request", lambda r: wrong.append(r.url) if r.url.startswith("http") and "://127.0.0.1" not in r.url else None
    )
    yield page
    page.close()
    assert not wrong, wrong


@pytest.fixture(scope="session")
def lab(chromium, tmp_path_factory):
    """JupyterLab over an empty folder: its address and the folder. It ends with the session."""
    home = tmp_path_factory.mktemp("lab")
    (home / "work").mkdir()
    for name, value in SETTINGS.items():
        file = home / "settings" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    env = {**os.environ, **own, "IPYTHONDIR": str(home / "ipython"), "PYTHONPATH": str(ROOT), "WORKBENCH_STRICT": "1",
           "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}  # fmt: skip
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.password=",
               f"--ServerApp.root_dir={home / 'work'}", "--LabApp.expose_app_in_browser=True"]  # fmt: skip
    log = (home / "log").open("w")
    server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/api", server, home / "log")
        yield f"http://127.0.0.1:{port}", home / "work"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
        log.close()


def wait_for(address: str, server, log: Path, seconds: float = 180):
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            return urllib.request.urlopen(address, timeout=2)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.3)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


class Notebook:
    """An open notebook, worked through JupyterLab's own commands."""

    def __init__(self, page, address: str, name: str):
        self.page = page
        page.goto(f"{address}/lab/tree/{name}?reset")
        page.wait_for_function(
            "() => { const w = window.jupyterapp?.shell.currentWidget; return w?.content?.widgets?.length && "
            "w.sessionContext.session?.kernel?.status === 'idle' }",
            timeout=180_000,
        )

    def run_all(self) -> None:
        """Run every cell; the first error fails the test."""
        self.page.evaluate("() => jupyterapp.commands.execute('notebook:run-all-cells')")
        for outputs in self.page.evaluate(
            "() => jupyterapp.shell.currentWidget.content.widgets.map(w => w.model.outputs?.toJSON() ?? [])"
        ):
            for one in outputs:
                assert one["output_type"] != "error", f"{one['ename']}: {one['evalue']}"

    def run(self, code: str) -> str:
        """Run a new cell below all others; returns what it printed."""
        outputs = self.page.evaluate(
            """async (source) => {
              const content = jupyterapp.shell.currentWidget.content, cells = content.model.sharedModel;
              cells.addCell({ cell_type: "code", source });
              content.activeCellIndex = content.widgets.length - 1;
              await jupyterapp.commands.execute("notebook:run-cell");
              return content.activeCell.model.outputs.toJSON();
            }""",
            code,
        )
        for one in outputs:
            assert one["output_type"] != "error", f"{one['ename']}: {one['evalue']}"
        return "".join(
            one["text"] for one in outputs if one["output_type"] == "stream" and one["name"] == "stdout"
        ).strip()


@pytest.fixture
def notebook(page, lab):
    """Opens a notebook by name, copied from `folder` or given as a list of code cells."""
    import nbformat

    def open_one(name: str, source: Path | list[str]) -> Notebook:
        address, folder = lab
        if isinstance(source, Path):
            shutil.copy(source / name, folder / name)
        else:
            made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in source])
            made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
            nbformat.write(made, folder / name)
        return Notebook(page, address, name)

    return open_one


def click_cell(canvas, row: int, column: int, **how) -> None:
    """Click the cell in this row (0 is the bottom one) and column."""
    canvas.scroll_into_view_if_needed()
    g = json.loads(canvas.get_attribute("data-geometry"))
    x = g["left"] + (column + 0.5) * g["cw"]
    y = g["top"] + (g["rows"] - 1 - row + 0.5) * g["ch"]
    canvas.click(position={"x": x, "y": y}, **how)


@pytest.fixture
def click():
    """Clicks a cell of a grid by row (0 is the bottom one) and column."""
    return click_cell


@pytest.fixture
def mount(page):
    """Renders a script over plain data, with a stand-in for the model; `read()` is what Python would see."""

    def render(name, data, background="#ffffff", width=900):
        esm, css = script(name)
        page.set_content(
            f"<meta charset=utf-8><style>{css}</style><body style='background:{background}'><div id=here></div>"
        )
        page.evaluate(
            """async ([esm, data, width]) => {
              const module = await import(URL.createObjectURL(new Blob([esm], { type: "text/javascript" })));
              const state = { data, selected: [] }, heard = {};
              if (data.bytes) state.patterns = new DataView(Uint8Array.from(data.bytes).buffer);
              window.state = state;
              const model = {
                get: (key) => state[key],
                set: (key, value) => { state[key] = value; (heard[`change:${key}`] ?? []).forEach((f) => f()); },
                save_changes() {},
                on: (event, f) => (heard[event] ??= []).push(f),
                off: (event, f) => { heard[event] = heard[event].filter((g) => g !== f); },
              };
              const el = document.querySelector("#here");
              el.style.width = `${width}px`;
              window.unmount = module.default.render({ model, el });
              window.heard = heard;
            }""",
            [esm, data, width],
        )
        return lambda: [data["names"][k] for k in page.evaluate("() => state.selected")]

    return render
