from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from utils.core import reproducibility
from utils.core.reproducibility import git_commit

CODE = ["utils/fit.py", "models/def_models.py", "models/templates/model.py", "env/requirements.txt", "pyproject.toml"]
WRITTEN = [
    "checkpoints/ResNet34/record.json",
    "assets/ResNet34/roc.png",
    "dataset/prepare_dataset.ipynb",
    "models/resnet_model.ipynb",
    "README.md",
    "benchmarks/recipes/x/summary.json",
]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in CODE + WRITTEN:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    monkeypatch.setattr(reproducibility, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", CODE)
def test_edited_code_is_marked(name: str, checkout: Path) -> None:
    assert len(git_commit()) == 40
    (checkout / name).write_text("after")
    assert git_commit().endswith("+changes")


def test_what_a_run_writes_is_no_change_of_the_code(checkout: Path) -> None:
    for name in WRITTEN:
        (checkout / name).write_text("after")
    assert len(git_commit()) == 40


def test_without_git_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproducibility, "ROOT", tmp_path)
    assert git_commit() == "unknown"
