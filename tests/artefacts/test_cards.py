"""The cards say what the code knows."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, extra

from models.def_models import BACKBONES, build_model
from utils.data.archives import DATA_SOURCES
from utils.data.classes import CLASSES

SLICES = 32
ATLAS = Path("/usr/share/mricron/templates/aal.nii.gz")
#: Numbers of both sides in the AAL atlas.
REGIONS = {"hippocampus": (37, 38), "parahippocampal gyrus": (39, 40), "amygdala": (41, 42), "thalamus": (77, 78)}
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


@pytest.mark.skipif(not ATLAS.is_file(), reason="needs Debian's mricron-data, an atlas of the brain")
def test_the_data_card_says_how_much_of_each_region_the_slices_show() -> None:
    nibabel = extra("nibabel")
    text = " ".join((ROOT / "dataset" / "DATA_CARD.md").read_text(encoding="utf-8").split())
    low, high = (int(bound.replace("−", "-")) for bound in re.findall(r"about z (−?\d+) to \+(\d+) mm", text)[0])
    image = nibabel.load(ATLAS)
    labels = np.asarray(image.dataobj)
    heights = image.affine[2, 2] * np.arange(labels.shape[2]) + image.affine[2, 3]
    assert not image.affine[2, :2].any() and high - low + 1 == SLICES
    seen = (heights >= low) & (heights <= high)
    found = {name: np.isin(labels, own) for name, own in REGIONS.items()}
    shares = {name: round(100 * own[:, :, seen].sum() / own.sum()) for name, own in found.items()}
    told = [f"{shares[name]} % of the {name}" for name in ("hippocampus", "parahippocampal gyrus")]
    assert ", ".join(told) in text and "none of the amygdala, and all of the thalamus" in text
    assert shares["amygdala"] == 0 and shares["thalamus"] == 100
