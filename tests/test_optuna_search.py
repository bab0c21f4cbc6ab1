from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest

from models.def_models import build_model
from utils.config import TrainConfig
from utils.optuna_search import SEARCH_SPACE, apply_hyperparams, load_hyperparams, optuna_search

SPACE = {
    "learning_rate": ("log", 1e-4, 1e-2),
    "optimizer": ("choice", ("adamw", "sgd")),
    "augmentation_strength": ("float", 0.0, 1.0),
    "trainable": ("choice", ("head", "all")),
}


def _search(splits, out: Path, **options) -> dict:
    def make():
        return build_model("resnet34", image_size=32)

    return optuna_search(make, splits, num_epochs=1, n_trials=2, out=out, space=SPACE, seed=1, **options)


def test_search_is_seeded_resumable_and_loadable(splits, tmp_path: Path) -> None:
    first = _search(splits, tmp_path / "a.json", journal=tmp_path / "study" / "journal.log")
    again = _search(splits, tmp_path / "b.json", journal=tmp_path / "study" / "journal.log")
    fresh = _search(splits, tmp_path / "c.json")
    assert first["params"] == again["params"] == fresh["params"] and again["trials"] == {"complete": 2}
    stored = json.loads((tmp_path / "a.json").read_text())
    assert stored["params"] == first["params"] and stored["data"]["fingerprint"] == splits.fingerprint
    params = load_hyperparams(tmp_path / "a.json")
    config = apply_hyperparams(TrainConfig(), params)
    assert config.learning_rate == params["learning_rate"]
    assert config.augmentation.strength == params["augmentation_strength"]


def test_a_study_that_goes_on_draws_new_trials_and_is_not_mixed_with_another(splits, tmp_path: Path) -> None:
    space = {"learning_rate": ("log", 1e-4, 1e-2)}
    options = {"space": space, "num_epochs": 1, "out": tmp_path / "a.json", "journal": tmp_path / "journal.log"}

    def make():
        return build_model("resnet34", image_size=32)

    for n_trials in (2, 4):
        optuna_search(make, splits, n_trials=n_trials, **options)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal.log")))
    rates = [t.params["learning_rate"] for t in optuna.load_study(study_name="search", storage=storage).trials]
    assert len(set(rates)) == 4
    with pytest.raises(ValueError, match="another num_epochs"):
        optuna_search(make, splits, n_trials=5, **options | {"num_epochs": 2})


def test_default_space_names_real_settings() -> None:
    for name, bounds in SEARCH_SPACE.items():
        value = bounds[1][0] if bounds[0] == "choice" else bounds[1]
        apply_hyperparams(TrainConfig(), {name: value})


def test_bad_space_and_bad_files(splits, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="search space of learning_rate"):
        optuna_search(
            lambda: build_model("resnet34", image_size=32),
            splits,
            num_epochs=1,
            n_trials=1,
            out=tmp_path / "x.json",
            space={"learning_rate": ("uniform", 0)},
        )
    with pytest.raises(FileNotFoundError, match="load_existing_hyperparams = False"):
        load_hyperparams(tmp_path / "none.json")
    (tmp_path / "odd.json").write_text('{"params": {"speed": 1}}')
    with pytest.raises(ValueError, match="speed"):
        load_hyperparams(tmp_path / "odd.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="no 'params'"):
        load_hyperparams(tmp_path / "list.json")
