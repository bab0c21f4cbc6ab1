"""A real browser opens a notebook, runs it and moves its slider. Left out where there is no Chromium."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import ROOT, left_out
from PIL import Image

from models.templates.build import notebooks
from utils.data.preparation import group_by_subject, split_and_save
from utils.data.raw_images import RawImages
from utils.evaluation.gate import Gate
from utils.experiments.fit import fit
from utils.reporting.notebooks import inject

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
SMALL = {"num_epochs": 1, "max_test_images": 8, "num_iter": 2, "train_steps": 1, "panel_images": 0}
#: Cells still to run, and what cells that failed say.
PROGRESS = """() => {
    // a folded cell shows no input, and so no prompt
    const all = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')];
    const cells = all.filter(cell => cell.querySelector('.jp-InputArea-prompt'));
    const prompt = cell => cell.querySelector('.jp-InputArea-prompt').textContent;
    return {
        cells: cells.length,
        started: cells.some(cell => /\\[[*\\d]/.test(prompt(cell))),
        waiting: cells.filter(cell => !/\\[\\d+\\]/.test(prompt(cell))).map(cell => prompt(cell) + cell.innerText),
        errors: [...document.querySelectorAll("[data-mime-type='application/vnd.jupyter.error']")].map(e => e.innerText)
    };
}"""


@pytest.fixture
def playwright_page() -> Iterator:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if not CHROMIUM or not sync_playwright:
        left_out("needs Chromium and env/requirements-browser.txt")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser.new_page(viewport={"width": 1400, "height": 1000})
        browser.close()


@pytest.fixture
def attack_notebook(phantoms: RawImages) -> Iterator[Path]:
    """The hardening notebook with small parameters, beside a clean model, inside the repository."""
    folder = ROOT / "runs" / f"browser_{os.getpid()}"
    split_and_save(phantoms, group_by_subject(phantoms), split="patient", out=folder / "data")
    small = {"num_epochs": 1, "batch_size": 32}
    fit("resnet34", folder / "data", folder / "checkpoints" / "ResNet34", image_size=32, settings=small)
    values = SMALL | {"out_dir": str(folder), "data_dir": str(folder / "data"), "profile": "quick"}
    values |= {"epsilons": [0, 2 / 255], "alphas": [0.002], "validation_images": 8}
    nbformat.write(inject(notebooks()[ROOT / "models" / "resnet_model_atk.ipynb"], values), folder / "explore.ipynb")
    yield folder / "explore.ipynb"
    shutil.rmtree(folder)


@contextmanager
def _serving(folder: Path, tmp_path: Path) -> Iterator[str]:
    """Address of a Jupyter server on a folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # all cells at once: by default only those in view are in the page
    tracker = tmp_path / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text(json.dumps({"windowingMode": "none"}))
    command = [sys.executable, "-m", "notebook", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--ServerApp.token=", "--ServerApp.password=", "--ServerApp.disable_check_xsrf=True"]
    environment = os.environ | {
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path),
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
    }
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--ServerApp.root_dir={folder}"], env=environment, stdout=log, stderr=log
        )
        address = f"http://127.0.0.1:{port}"
        for _ in range(120):
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        yield address
        process.terminate()
        process.wait(timeout=30)


def _wait_until(ready: Callable[[], object], what: Callable[[], str], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, what()
        time.sleep(0.5)


def _kernel_state(server: str) -> str:
    sessions = json.loads(urllib.request.urlopen(f"{server}/api/sessions", timeout=10).read())
    return sessions[0]["kernel"]["execution_state"] if sessions else "none"


def _run_all(page, server: str) -> None:
    """Run every cell and wait for the last; a failing cell or a kernel that stopped early says which cell it is."""
    # the page shows cells seconds before it has a kernel, and cells that are run until then are left out silently
    _wait_until(lambda: _kernel_state(server) == "idle", lambda: f"kernel: {_kernel_state(server)}", 120)

    def started() -> bool:
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.wait_for_timeout(2000)
        return page.evaluate(PROGRESS)["started"]

    _wait_until(started, lambda: f"no cell starts: {page.evaluate(PROGRESS)}", 60)

    def done() -> bool:
        progress = page.evaluate(PROGRESS)
        assert not progress["errors"], progress["errors"]
        return progress["cells"] > 5 and not progress["waiting"]

    # polled from here: a page that draws no frames would never look by itself
    _wait_until(done, lambda: f"kernel {_kernel_state(server)}, {page.evaluate(PROGRESS)}", 400)


@pytest.fixture
def server(attack_notebook: Path, tmp_path: Path) -> Iterator[str]:
    with _serving(attack_notebook.parent, tmp_path) as address:
        yield address


@pytest.fixture
def predict_folder() -> Iterator[Path]:
    """The notebook that answers about scans, with the repository's own models; it begins with a phantom."""
    folder = ROOT / "runs" / f"browser_predict_{os.getpid()}"
    folder.mkdir(parents=True)
    fresh = notebooks()[ROOT / "models" / "predict.ipynb"]
    nbformat.write(inject(fresh, {"scan": "phantom"}), folder / "predict.ipynb")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def predict_server(predict_folder: Path, tmp_path: Path) -> Iterator[str]:
    with _serving(predict_folder, tmp_path) as address:
        yield address


def _draw_scans(folder: Path) -> None:
    """A training slice as the gate keeps it, coarse, which it calls so, and noise."""
    kept = Gate.load(ROOT / "checkpoints" / "EfficientNetB0").references[3].numpy()
    Image.fromarray(kept).resize((128, 128), Image.Resampling.BICUBIC).save(folder / "mine.png")
    noise = np.random.default_rng(0).integers(0, 255, (128, 128), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")


def _upload(page, explorer, scan: Path, *words: str) -> None:
    """Press the button, choose a file, and wait until all words stand below it."""
    with page.expect_file_chooser() as chooser:
        explorer.get_by_role("button").first.click()
    chooser.value.set_files(scan)
    _wait_until(lambda: all(word in explorer.inner_text() for word in words), explorer.inner_text, 120)


def _drag(page, explorer, before: str, pixels: int) -> None:
    """Move the first slider to the right, and wait until the picture is another one."""
    handle = explorer.locator(".noUi-handle").first
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + pixels, middle[1], steps=8)
    page.mouse.up()
    said = "the picture did not change after the slider was moved"
    _wait_until(lambda: explorer.locator("img").first.get_attribute("src") != before, lambda: said, 60)


def test_voila_shows_the_notebook_as_a_page_that_answers(playwright_page, predict_folder: Path, tmp_path: Path) -> None:
    _draw_scans(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "voila", "predict.ipynb", "--no-browser", f"--port={port}"]
    with (tmp_path / "voila.log").open("w") as log:
        process = subprocess.Popen(command, cwd=predict_folder, stdout=log, stderr=log)
    try:
        page = playwright_page

        def opened() -> bool:
            assert process.poll() is None, (tmp_path / "voila.log").read_text()
            try:
                return page.goto(f"http://127.0.0.1:{port}/", timeout=120_000).ok
            except Exception:  # the server does not listen yet
                return False

        _wait_until(opened, (tmp_path / "voila.log").read_text, 150)
        explorer = page.locator(".widget-vbox").filter(has=page.get_by_text("eps (/255)")).last
        explorer.wait_for(timeout=120_000)
        assert "uf.answer_explorer" not in page.content()  # no code on the page
        _upload(page, explorer, tmp_path / "mine.png", "mine:", "Gate: doubtful", "Answer:")
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_a_scan_is_uploaded_answered_attacked_and_noise_refused(playwright_page, predict_server, tmp_path) -> None:
    _draw_scans(tmp_path)
    page = playwright_page
    page.goto(f"{predict_server}/notebooks/predict.ipynb")
    page.wait_for_selector(".jp-CodeCell", timeout=60_000)
    _run_all(page, predict_server)
    explorer = page.locator(".widget-vbox").filter(has=page.get_by_text("eps (/255)")).last

    _upload(page, explorer, tmp_path / "mine.png", "mine:", "Gate: doubtful", "Answer:")
    picture = explorer.locator("img").first
    picture.wait_for(timeout=60_000)
    before = picture.get_attribute("src")
    explorer.screenshot(path=tmp_path / "answer.png")
    _drag(page, explorer, before, 120)
    _upload(page, explorer, tmp_path / "noise.png", "noise:", "Gate: refused", "No answer.")
    assert not page.evaluate(PROGRESS)["errors"]


def test_the_slider_changes_the_picture(playwright_page, server: str, attack_notebook: Path, tmp_path: Path) -> None:
    page = playwright_page
    page.goto(f"{server}/notebooks/{attack_notebook.name}")
    page.wait_for_selector(".jp-CodeCell", timeout=60_000)
    _run_all(page, server)

    explorer = page.locator(".widget-vbox").filter(has=page.get_by_text("eps (/255)")).last
    picture = explorer.locator("img").first
    picture.wait_for(timeout=60_000)
    picture.scroll_into_view_if_needed()
    before, shot = picture.get_attribute("src"), explorer.screenshot(path=tmp_path / "before.png")
    _drag(page, explorer, before, 80)
    assert explorer.screenshot(path=tmp_path / "after.png") != shot
    assert not page.evaluate(PROGRESS)["errors"]
