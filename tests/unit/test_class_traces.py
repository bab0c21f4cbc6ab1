"""Classes that differ in how their images were saved or turned, and not in the heads alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.data.phantom import PhantomConfig, make_phantoms
from utils.data.preparation import group_by_subject
from utils.data.raw_images import RawImages
from utils.data.sources import load_source


@pytest.fixture(scope="module")
def heads() -> RawImages:
    return make_phantoms(PhantomConfig(n_subjects=24, n_levels=4, seed=3))


def _saved(folder: Path, heads: RawImages, save: Callable[[Image.Image, Path, bool], object], n: int = 24) -> list[str]:
    """Notes of a set of two classes; ``save`` is told which of them an image is of."""
    for number, pixels in enumerate(heads.pixels[:n]):
        second = number % 2 == 1
        path = folder / ("AD" if second else "CN") / str(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        save(Image.fromarray(pixels), path, second)
    return load_source(folder).notes


def _other_size(image: Image.Image, path: Path, second: bool) -> None:
    image.resize((60, 60) if second else (64, 64)).save(f"{path}.png")


def _other_bits(image: Image.Image, path: Path, second: bool) -> None:
    deep = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    (deep if second else image).save(f"{path}.png")


def _other_format(image: Image.Image, path: Path, second: bool) -> None:
    image.save(f"{path}.bmp" if second else f"{path}.png")


@pytest.mark.parametrize(
    ("save", "said"),
    [
        (_other_size, "The size of the files gives the class of 100% of the images away (60 x 60 pixels: AD; 64 x 64"),
        (
            _other_bits,
            "The bit depth of the files gives the class of 100% of the images away (16 bits: AD; 8 bits: CN)",
        ),
        (_other_format, "The format of the files gives the class of 100% of the images away (BMP: AD; PNG: CN)"),
    ],
)
def test_what_tells_the_classes_beside_the_heads_is_said(
    save: Callable[[Image.Image, Path, bool], object], said: str, heads: RawImages, tmp_path: Path
) -> None:
    assert any(said in note for note in _saved(tmp_path, heads, save))


def test_traits_that_both_classes_share_are_no_trace(heads: RawImages, tmp_path: Path) -> None:
    def mixed(image: Image.Image, path: Path, second: bool) -> None:
        side = 60 if int(path.name) % 3 else 64
        image.resize((side, side)).save(f"{path}.{'png' if int(path.name) % 4 < 2 else 'bmp'}")

    assert not any("gives the class" in note for note in _saved(tmp_path, heads, mixed))


@pytest.mark.slow
@pytest.mark.parametrize("change", [None, np.flipud, lambda image: 255 - image])
def test_a_class_that_is_turned_or_a_negative_is_noticed_by_a_linear_rule(
    heads: RawImages, change: Callable[[np.ndarray], np.ndarray] | None
) -> None:
    second = np.arange(len(heads)) // 4 % 2 == 1
    pixels = np.stack([change(image) if own and change else image for own, image in zip(second, heads.pixels)])
    names = [f"{'AD' if own else 'CN'}/sub-{n // 4:02d}_{n % 4}.png" for n, own in enumerate(second)]
    raw = replace(
        heads, pixels=pixels, labels=second.astype(np.int64), paths=names, classes=("CN", "AD"), subjects=None
    )
    notes = " ".join(group_by_subject(replace(raw, name="set", info={})).notes)
    assert ("A linear rule on a few principal components" in notes) == (change is not None)
