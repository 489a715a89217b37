"""The page of notebook 00 as a person meets it: JupyterLab in headless Chromium."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from opticam.lab.datasets import demo
from opticam.lab.files import REPOSITORY

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright; it comes with the extra 'test'")
pytest.importorskip("jupyterlab", reason="no JupyterLab; it comes with the extra 'batch'")
pytest.importorskip("ipywidgets", reason="no ipywidgets; they come with the extra 'lab'")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync"""
FIELDS = {"search": "input[list]", "steps": "input[type=number]"}
SHOWN = "img => img.complete && img.naturalWidth > 0 && img.offsetWidth > 0"


@pytest.fixture
def browser():
    with sync_api.sync_playwright() as playwright:
        if CHROMIUM is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium: neither the system's nor playwright's own")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        yield browser
        browser.close()


@pytest.fixture
def lab(tmp_path):
    """Address of a JupyterLab of this environment on a copy of the notebook, with nothing of the user's settings."""
    (tmp_path / "notebooks").mkdir()
    notebook = json.loads((REPOSITORY / "notebooks" / "00_explorer.ipynb").read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []  # what is seen has been computed
    (parameters,) = (cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", []))
    parameters["source"] = "".join(parameters["source"]).replace("num_steps: int = 100", "num_steps: int = 3")
    (tmp_path / "notebooks" / "00_explorer.ipynb").write_text(json.dumps(notebook))
    (tmp_path / "CONFIG_DIR" / "labconfig").mkdir(parents=True)
    silent = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (tmp_path / "CONFIG_DIR" / "labconfig" / "page_config.json").write_text(json.dumps(silent))
    tracker = tmp_path / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text(json.dumps({"windowingMode": "none"}))  # cells out of sight stay in the page
    folders = {f"JUPYTER_{name}": str(tmp_path / name) for name in ("CONFIG_DIR", "RUNTIME_DIR", "DATA_DIR")}
    folders |= {"IPYTHONDIR": str(tmp_path / "ipython"), "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces")}
    folders |= {"JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"), "JUPYTER_PREFER_ENV_PATH": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, token = f"http://127.0.0.1:{port}", "for-this-test"
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.root_dir": tmp_path / "notebooks",
        "ServerApp.allow_root": True,
        "IdentityProvider.token": token,
    }
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", *(f"--{k}={v}" for k, v in options.items())]
    with (tmp_path / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | folders, stdout=log, stderr=log)
        try:
            for _ in range(300):
                assert server.poll() is None, (tmp_path / "lab.log").read_text()
                try:
                    urllib.request.urlopen(f"{address}/api?token={token}", timeout=5).close()  # noqa: S310
                    break
                except OSError:
                    time.sleep(0.2)
            yield f"{address}/lab/tree/00_explorer.ipynb?token={token}"
        finally:
            server.terminate()  # it ends its kernels first
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


@pytest.fixture
def page(browser, lab, tmp_path):
    """JupyterLab in a browser; what it showed in the end is in `tmp_path`."""
    page = browser.new_page(viewport={"width": 1500, "height": 1500})
    page.set_default_timeout(90_000)
    page.goto(lab)
    yield page
    page.screenshot(path=tmp_path / "end.png")


@pytest.mark.browser
def test_the_page_explains_goes_back_a_step_refuses_and_stops(page, tmp_path):
    view = page.locator(".jp-OutputArea .widget-vbox").first  # the outermost box: the whole page

    def shows(text):
        view.get_by_text(re.compile(text)).first.wait_for()

    def explain(**fields):
        for label, value in fields.items():
            view.locator(FIELDS[label]).fill(value)
            page.keyboard.press("Tab")
        view.get_by_role("button", name="Explain").click()

    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator("[data-command='runmenu:run-all']").click()
    shows("Opti-CAM for prairie chicken: probability .* when masked")  # the last cell's question

    explain(search="kite")
    shows("Opti-CAM for kite: probability 13.1 % -> ")
    shown, masked = view.locator(".widget-image").all()[1:3]
    told = view.get_by_text(re.compile("^logit "))
    before = [told.inner_text(), shown.get_attribute("src"), masked.get_attribute("src")]
    view.locator(".noUi-handle").press("ArrowLeft")
    page.wait_for_function(
        "([before, told, ...images]) => [told.innerText, ...images.map(i => i.src)].every((v, k) => v != before[k])",
        arg=[before, *(place.element_handle() for place in (told, shown, masked))],
    )
    assert all(picture.evaluate(SHOWN) for picture in (shown, masked))
    view.screenshot(path=tmp_path / "page.png")

    explain(search="unicorn")
    shows("class: wanted an index in 0..999 or a class name, got 'unicorn'")
    with page.expect_file_chooser() as chooser:
        view.get_by_role("button", name="Upload").click()
    chooser.value.set_files({"name": "broken.jpg", "mimeType": "image/jpeg", "buffer": b"no photo"})
    shows("image: broken.jpg is not an image that can be read")

    explain(search="kite", steps="1000")
    shows("Opti-CAM: [1-9][0-9]* of 1000 steps")
    view.get_by_role("button", name="Stop").click()
    shows("Stopped after [0-9]{1,3} of 1000 steps")
    explain(steps="2")
    shows("Opti-CAM for kite: probability 13.1 % -> ")

    with page.expect_file_chooser() as chooser:
        view.get_by_role("button", name="Upload").click()
    chooser.value.set_files(demo().paths[1])
    shows("Press Explain for a map")
    explain(search="folding chair")
    shows("Opti-CAM for folding chair: probability ")
