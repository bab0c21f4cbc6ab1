"""The cards say what the code knows."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT

from models.def_models import BACKBONES, build_model
from utils.data.archives import DATA_SOURCES
from utils.data.classes import CLASSES

SLICES = 32
PAGES = [path for pattern in ("*.md", "*/*.md") for path in sorted(ROOT.glob(pattern))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_pages_import_exists(page: Path) -> None:
    for module, names in re.findall(r"^from ((?:utils|models)[\w.]*) import (.+)$", page.read_text("utf-8"), re.M):
        loaded = import_module(module)
        for name in (word.split(" as ")[0] for word in names.split(", ")):
            assert hasattr(loaded, name) or import_module(f"{module}.{name}"), (page, name)


def test_the_data_card_counts_as_the_sources_do() -> None:
    text = (ROOT / "dataset" / "DATA_CARD.md").read_text(encoding="utf-8")
    assert "Not for clinical use" in text
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    small, large = DATA_SOURCES["alzheimer_mri"], DATA_SOURCES["best_alzheimer_mri"]
    for name in CLASSES:
        found = [int(number.replace(",", "")) for number in re.findall(r"[\d,]+", rows[name])]
        real = small.class_counts[name]
        assert found == [real, large.class_counts[name], real // SLICES, real]
    found = [int(number.replace(",", "")) for number in re.findall(r"[\d,]+", rows["all"])]
    assert found == [small.n_images, large.n_images, small.n_subjects, small.n_images]
    for number in (large.n_synthetic, large.n_duplicates):
        assert f"{number:,}" in text


def test_the_model_card_counts_parameters_as_the_models_do() -> None:
    text = (ROOT / "checkpoints" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "Not for clinical use" in text
    for name, backbone in BACKBONES.items():
        millions = sum(p.numel() for p in build_model(name, image_size=64).parameters()) / 1e6
        row = next(line for line in text.splitlines() if line.startswith(f"| `{backbone.title}`, "))
        assert row.split(" | ")[2] == f"{millions:.0f} M"
