"""The page of all figures."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from utils.core.paths import read_json, write_json
from utils.reporting.gallery import CAPTIONS, gallery, write_gallery


def test_the_committed_page_shows_every_committed_figure_with_words() -> None:
    page = (ROOT / "assets" / "index.html").read_text(encoding="utf-8")
    shown = re.findall(r'<img src="([^"]+)" alt="([^"]+)"', page)
    figures = [*(ROOT / "assets").rglob("*.png"), *(ROOT / "assets").rglob("*.gif")]
    figures += (ROOT / "benchmarks" / "cross_validation").glob("*/*.png")
    figures += (ROOT / "benchmarks" / "combinations").glob("*/*.png")
    figures += (ROOT / "benchmarks" / "atlases").glob("*/*.png")
    assert {(ROOT / "assets" / name).resolve() for name, _ in shown} == {path.resolve() for path in figures}
    assert all(Path(name).stem in CAPTIONS for name, _ in shown)
    assert page == gallery(ROOT) and "not for clinical use" in page
    # an experiment by what it began with, its folder behind that
    assert ">Folds of ResNet34, 64 px <small>(resnet34_64px)</small></h2>" in page


def test_the_committed_animation_is_small_and_its_record_tells_its_answers() -> None:
    path, record = ROOT / "assets" / "attack_sweep.gif", read_json(ROOT / "assets" / "hero.json")
    with Image.open(path) as animation:
        assert path.stat().st_size < 2_000_000 and animation.n_frames == len(record["sweep"]["epsilons"])
    chances = np.array(record["sweep"][record["model"]["title"]])
    assert chances.sum(1) == pytest.approx(1, abs=1e-4)
    assert chances[0] == pytest.approx(record["probabilities"][0], abs=1e-4)


def test_a_folder_of_ones_own_gets_a_page_with_its_notes(tmp_path: Path) -> None:
    for name in ("ResNet34/loss_curve", "ResNet34_atk/worst_case", "Own<1>/my_plot"):
        (tmp_path / "assets" / name).parent.mkdir(parents=True)
        (tmp_path / "assets" / f"{name}.png").write_bytes(b"")
    write_json(tmp_path / "checkpoints" / "ResNet34" / "record.json", {"note": "phantom demo, no medical meaning"})
    page = write_gallery(tmp_path).read_text(encoding="utf-8")
    assert page.index("my plot") < page.index("Loss by epoch") < page.index("ResNet34, hardened</h2>")
    # of a run with one note it stands on top, before any figure
    assert page.index("<strong>phantom demo, no medical meaning.</strong>") < page.index("<img")
    write_json(tmp_path / "checkpoints" / "ResNet34_atk" / "record.json", {"note": "another"})
    assert "<strong>" not in gallery(tmp_path) and '<a href="RESULTS.md">' in gallery(ROOT)
    assert "Loss by epoch of the models that vote." in gallery(ROOT)
    assert "phantom demo, no medical meaning" in page and "Own&lt;1&gt;" in page and "Own<1>" not in page
    assert not re.search(r"https?://", page)


def test_no_figures_are_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run the notebooks first"):
        write_gallery(tmp_path)
