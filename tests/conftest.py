from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from models import def_models
from models.def_models import Backbone, MRIClassifier, build_model
from tests.toy import toy_images, train_toy
from utils.data.phantom import PhantomConfig, make_phantoms
from utils.data.preparation import group_by_subject, splits_in_memory
from utils.data.raw_images import RawImages
from utils.data.sets import DataSplits, ImageSet
from utils.reporting import style

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """One thread a process, here and in kernels: several processes run beside each other."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


#: Whole commands and notebooks, and what reads many committed files, take their time; single tests beyond two seconds
#: are marked where they stand.
SLOW_FOLDERS, SLOW_FILES = {"integration"}, {"test_readme.py", "test_real_images.py"}
#: These begin: a process that took one of them last would work alone at the end.
LONGEST = ("test_notebooks.py", "test_readme.py", "test_real_images.py", "test_browser.py", "test_processes.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each test is of the kind its folder says; ``-m "not slow"`` leaves out what takes long. Long files first."""
    for item in items:
        kind = item.path.parent.name
        item.add_marker(getattr(pytest.mark, kind))
        if kind in SLOW_FOLDERS or item.path.name in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


#: Files whose figures are drawn to see that they can be: half of that time would go into pixels.
COARSE = {
    "test_atlas.py",
    "test_benchmarks.py",
    "test_by_patient.py",
    "test_compare_recipes.py",
    "test_cross_validate.py",
    "test_optuna_search.py",
    "test_readme.py",
    "test_recipes.py",
    "test_robustness_command.py",
}


@pytest.fixture(autouse=True)
def coarse_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few pixels a figure in the files of ``COARSE``; a kernel of its own, as of a notebook, draws them all."""
    if request.path.name in COARSE:
        monkeypatch.setitem(style._STYLE, "savefig.dpi", 40)


@pytest.fixture(scope="session")
def phantoms() -> RawImages:
    return make_phantoms(PhantomConfig(n_subjects=24, n_levels=4))


@pytest.fixture(scope="session")
def splits(phantoms: RawImages) -> DataSplits:
    return splits_in_memory(phantoms, group_by_subject(phantoms), "patient")


@pytest.fixture
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet34", image_size=32).eval()


class SmallNet(nn.Module):
    """A classifier with every kind of layer whose mode matters, small enough for property tests."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(4)
        )
        self.head = nn.Linear(128, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images * 2 - 1).flatten(1))


@pytest.fixture
def small_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backbone ``small`` that trains in a second; the training loop does not know the difference."""

    def build(num_classes: int, image_size: int) -> nn.Module:
        body = SmallNet().body
        body[0] = nn.Conv2d(3, 8, 3, stride=2)
        net = nn.Sequential(body, nn.Flatten())
        net.add_module("out", nn.Linear(128, num_classes))
        return net

    add_backbone(monkeypatch, "small", build)


def add_backbone(monkeypatch: pytest.MonkeyPatch, name: str, build: Callable[[int, int], nn.Module]) -> None:
    """For one test, a backbone whose first module is its body and whose head is called ``out``."""
    entry = Backbone(name.title(), build, "out", lambda net: [net[0]], lambda net: [net[0][0]], dict)
    monkeypatch.setitem(def_models.BACKBONES, name, entry)


def small_model(seed: int = 0) -> MRIClassifier:
    """Of the backbone that the fixture ``small_backbone`` adds."""
    torch.manual_seed(seed)
    return build_model("small", image_size=32)


@pytest.fixture
def small_net() -> nn.Module:
    torch.manual_seed(0)
    return SmallNet().eval()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    return torch.rand(12, 1, 20, 20, generator=draws), torch.randint(4, (12,), generator=draws)


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """Two classes of three 24 x 24 images each."""
    return write_class_folders(tmp_path / "images")


def write_class_folders(
    root: Path, classes: tuple[str, ...] = ("Non_Demented", "Mild_Demented"), prefix: str = "", seed: int = 0
) -> Path:
    rng = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(3):
            pixels = rng.integers(0, 255, (24, 24), dtype=np.uint8)
            pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:] = 0, 0, 0, 0
            Image.fromarray(pixels).save(root / name / f"{prefix}{number}.png")
    return root


def left_out(reason: str) -> None:
    """Skip a test; but the project's own CI installs all that tests need, so there it fails."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


def extra(module: str) -> Any:
    """A module of ``env/requirements-scans.txt``; the project's own CI installs them: there, a missing one fails."""
    if os.environ.get("CI"):
        return import_module(module)
    return pytest.importorskip(module, reason="needs env/requirements-scans.txt")


def forked(work: Callable[[], object]) -> int:
    """Number of a process that does ``work``; it ends with 0, or with 1 after an error."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(process: int) -> int:
    """Exit status of a process of :func:`forked`; a signal that killed it is negative."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.fixture(scope="session")
def mri_root() -> Path:
    """Folder of the real archives; tests that need it run where MRI_DATA_ROOT is set."""
    if not os.environ.get("MRI_DATA_ROOT"):
        pytest.skip("MRI_DATA_ROOT is not set: no real images here")
    return Path(os.environ["MRI_DATA_ROOT"])


@pytest.fixture(scope="session")
def toy_nets() -> dict[str, nn.Module]:
    """A plain and an adversarially trained small net; tests must not change them."""
    return {"plain": train_toy(), "hardened": train_toy(hardened=True)}


@pytest.fixture(scope="session")
def toy_test() -> ImageSet:
    return toy_images(160, seed=2)
