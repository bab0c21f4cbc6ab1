from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from conftest import ROOT, small_model

from models.def_models import build_model
from utils.data.preparation import group_by_subject, split_and_save
from utils.experiments.optuna_journal import at_work, open_journal
from utils.experiments.search_space import (
    HARDENING_SPACE,
    SEARCH_SPACE,
    apply_hyperparams,
    apply_to_objective,
    pick_space,
)
from utils.optuna_search import RESCORE, load_hyperparams, optuna_search
from utils.reporting.figures import optuna_figures
from utils.training.config import TrainConfig
from utils.training.loop import TrainResult
from utils.training.objectives import RECIPES, Adversarial, make_objective

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


def test_the_file_tells_the_whole_search_and_is_drawn_from(
    splits, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    space = {"learning_rate": ("log", 1e-4, 1e-2), "weight_decay": ("log", 1e-4, 1e-1)}

    def make():
        return build_model("resnet34", image_size=32)

    found = optuna_search(make, splits, num_epochs=1, n_trials=3, out=tmp_path / "found.json", space=space)
    stored = json.loads((tmp_path / "found.json").read_text())
    assert stored == found and stored["selected_by"] == "validation_balanced_accuracy"
    assert [trial["number"] for trial in stored["history"]] == [0, 1, 2]
    assert stored["history"][0]["params"] == {"learning_rate": 1e-3, "weight_decay": 0.05}  # those without a search
    best = max(stored["history"], key=lambda trial: trial["value"])
    assert best["value"] == stored["value"]
    assert f"trial 2 {stored['history'][2]['state']}: {stored['history'][2]['value']:.3f}" in capsys.readouterr().out
    if stored["importance"]:
        assert set(stored["importance"]) == set(space) and sum(stored["importance"].values()) == pytest.approx(1)
    stored["importance"] = {"learning_rate": 0.7, "weight_decay": 0.3}
    assert set(optuna_figures(stored, "ResNet34")) == {"optuna_history"}  # three trials tell nothing of importance
    stored["history"] = [trial | {"number": n} for n, trial in enumerate(4 * stored["history"])]
    figures = optuna_figures(stored, "ResNet34", "a note")
    assert set(figures) == {"optuna_history", "optuna_importance"}
    assert "a note" in figures["optuna_history"].get_suptitle()
    drawn = [bar.get_width() for bar in figures["optuna_importance"].axes[0].patches]
    assert sorted(drawn) == pytest.approx([30, 70])


def _harden(splits, out: Path, n_trials: int = 3, **options) -> dict:
    objective = Adversarial(eps=2 / 255, steps=1)
    space = {"learning_rate": ("log", 1e-4, 1e-2), "adv_weight": ("float", 0.3, 1.0), "ema_decay": ("choice", (0, 0.9))}
    config = TrainConfig(validation_images=12)
    shared = {"num_epochs": 2, "n_trials": n_trials, "space": space, "objective": objective, "config": config}
    return optuna_search(small_model, splits, out=out, **shared | options)


def test_hardening_is_scored_by_the_worst_case(splits, tmp_path: Path, small_backbone) -> None:
    found = _harden(splits, tmp_path / "a.json")
    assert found["selected_by"] == "validation_worst_case" and found["objective"]["eps"] == 2 / 255
    assert found["attacks"] == [attack.title for attack in RESCORE]
    finished = [trial for trial in found["history"] if trial["state"] == "complete"]
    assert found["value"] == max(trial["robust"] for trial in finished)
    again = _harden(splits, tmp_path / "b.json")
    assert again["params"] == found["params"]
    assert apply_to_objective(Adversarial(eps=0.1), found["params"]).adv_weight == found["params"]["adv_weight"]
    assert apply_hyperparams(TrainConfig(), load_hyperparams(tmp_path / "a.json")).ema_decay in (0, 0.9)
    assert set(optuna_figures(found, "ResNet34_atk")) >= {"optuna_history", "optuna_pareto"}


@pytest.mark.parametrize("pareto", [False, True])
def test_the_clean_floor_decides_who_may_win(splits, tmp_path: Path, small_backbone, monkeypatch, pareto: bool) -> None:
    """The more robust a made-up trial is, the less it gets right without attack."""
    made = iter(((0.9, 0.2), (0.7, 0.5), (0.4, 0.6), (0.6, 0.3)))
    monkeypatch.setattr("utils.optuna_search._score", lambda trial, *_: _note(trial, *next(made)))
    found = _harden(splits, tmp_path / "a.json", n_trials=4, clean_floor=0.65, pareto=pareto)
    assert (found["value"], found["floor_reached"], found["chosen"]) == (0.5, True, 1)
    figure = optuna_figures(found, "any")["optuna_pareto"]
    front = next(line for line in figure.axes[0].lines if line.get_label() == "not beaten in both")
    assert front.get_xydata().tolist() == [[90, 20], [70, 50], [40, 60]]


def _note(trial: optuna.Trial, clean: float, robust: float) -> tuple[float, float]:
    trial.set_user_attr("clean", clean)
    trial.set_user_attr("robust", robust)
    return clean, robust


def test_a_floor_that_nobody_reaches_is_said(splits, tmp_path: Path, small_backbone, monkeypatch) -> None:
    made = iter(((0.5, 0.2), (0.6, 0.1)))
    monkeypatch.setattr("utils.optuna_search._score", lambda trial, *_: _note(trial, *next(made)))
    found = _harden(splits, tmp_path / "a.json", n_trials=2, clean_floor=0.9)
    assert not found["floor_reached"] and found["value"] == 0.1


def test_floors_are_for_hardening(splits, tmp_path: Path) -> None:
    for wrong in ({"clean_floor": 0.5}, {"pareto": True}):
        with pytest.raises(ValueError, match="are for hardening"):
            optuna_search(small_model, splits, num_epochs=1, n_trials=1, out=tmp_path / "a.json", **wrong)
    with pytest.raises(ValueError, match="clean_floor must be"):
        _harden(splits, tmp_path / "a.json", clean_floor=70)


def test_workers_share_one_study_and_survive_a_killed_one(phantoms, tmp_path: Path) -> None:
    split_and_save(phantoms, group_by_subject(phantoms), split="patient", out=tmp_path / "data")
    arguments = ["--backbone", "efficientnet_b0", "--data", str(tmp_path / "data"), "--image-size", "32"]
    arguments += ["--n-trials", "4", "--num-epochs", "1", "--space", "learning_rate", "optimizer"]
    arguments += ["--journal", str(tmp_path / "journal.log")]

    def start(worker: int) -> subprocess.Popen:
        command = [sys.executable, "-m", "utils.optuna_search", *arguments, "--worker", str(worker)]
        return subprocess.Popen([*command, "--out", str(tmp_path / f"{worker}.json")], cwd=ROOT)

    victim = start(0)
    while not (tmp_path / "journal.log").is_file() or "trial_id" not in (tmp_path / "journal.log").read_text():
        assert victim.poll() is None
        time.sleep(0.05)
    victim.kill()
    victim.wait()
    workers = [start(1), start(2)]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    stored = [json.loads((tmp_path / f"{worker}.json").read_text()) for worker in (1, 2)]
    last = max(stored, key=lambda found: len(found["history"]))
    done = [trial for trial in last["history"] if trial["state"] in ("complete", "pruned")]
    # each of two workers may have a trial under way when the fourth is done
    assert 4 <= len(done) <= 5 and len({trial["params"]["learning_rate"] for trial in done}) == len(done)


def test_a_hopeless_trial_is_pruned(splits, tmp_path: Path, small_backbone, monkeypatch) -> None:
    """Three good trials, then one that stays below their median."""
    levels = iter((0.9, 0.9, 0.9, 0.1))
    epochs_run = []

    def fake(model, splits, *, objective, config, on_epoch) -> TrainResult:
        level, history = next(levels), []
        for epoch in range(config.num_epochs):
            history.append({"epoch": epoch, "validation_balanced_accuracy": level})
            epochs_run.append(level)
            on_epoch(history[-1])
        return TrainResult(history, 0, "validation_balanced_accuracy", 1.0)

    monkeypatch.setattr("utils.optuna_search.train", fake)
    space = {"learning_rate": ("log", 1e-4, 1e-2)}
    found = optuna_search(small_model, splits, num_epochs=5, n_trials=4, out=tmp_path / "a.json", space=space)
    assert found["trials"] == {"complete": 3, "pruned": 1} and epochs_run.count(0.1) < 5
    assert optuna_figures(found, "any")["optuna_history"].axes[0].get_legend_handles_labels()[1][:2] == [
        "complete",
        "pruned",
    ]


def test_space_by_name() -> None:
    assert "trainable" in pick_space() and "trainable" not in pick_space(freezing=False)
    assert list(pick_space(["optimizer"])) == ["optimizer"]
    with pytest.raises(ValueError, match=r"names speed.*learning_rate"):
        pick_space(["speed"])


def test_default_space_names_real_settings() -> None:
    for name, bounds in SEARCH_SPACE.items():
        value = bounds[1][0] if bounds[0] == "choice" else bounds[1]
        apply_hyperparams(TrainConfig(), {name: value})
    recipes = [make_objective(name, eps=0.1) for name in RECIPES]
    for name, bounds in HARDENING_SPACE.items():
        value = bounds[1][1] if bounds[0] == "choice" else bounds[1]
        changed = apply_hyperparams(TrainConfig(), {name: value}) != TrainConfig()
        assert changed or any(apply_to_objective(recipe, {name: value}) != recipe for recipe in recipes), name


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


def _journal_of(tmp_path: Path, splits, **options) -> tuple[Path, dict]:
    journal = tmp_path / "j" / "journal.log"
    return journal, _search(splits, tmp_path / "a.json", journal=journal, **options)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, "seed"),
        ({"make": lambda: build_model("efficientnet_b0", image_size=32)}, "backbone"),
        ({"make": lambda: build_model("resnet34", image_size=48)}, "image_size"),
        ({"make": lambda: build_model("resnet34", image_size=32, trainable="head")}, "trainable"),
        ({"config": TrainConfig(batch_size=16)}, "batch_size 64, not 16"),
    ],
)
def test_a_journal_is_not_continued_by_another_search(change: dict, named: str, splits, tmp_path: Path) -> None:
    journal, _ = _journal_of(tmp_path, splits)
    arguments = {"make": lambda: build_model("resnet34", image_size=32), "seed": 1} | change
    make = arguments.pop("make")
    before = journal.read_bytes()
    with pytest.raises(ValueError, match=f"holds a search with another .*{named}"):
        optuna_search(
            make, splits, num_epochs=1, n_trials=3, out=tmp_path / "b.json", space=SPACE, journal=journal, **arguments
        )
    assert journal.read_bytes().startswith(before) and not (tmp_path / "b.json").exists()


def test_a_diverging_trial_is_a_bad_one_and_not_the_end(splits, tmp_path: Path, monkeypatch) -> None:
    calls = []

    def diverge(trial: optuna.Trial, *_):
        calls.append(1)
        if len(calls) == 1:
            raise FloatingPointError("the training loss became nan in epoch 1; lower learning_rate")
        trial.set_user_attr("clean", 0.5)
        return 0.5, None

    monkeypatch.setattr("utils.optuna_search._score", diverge)
    found = _search(splits, tmp_path / "a.json")
    assert found["trials"] == {"complete": 1, "fail": 1} and found["history"][0]["state"] == "fail"
    assert found["history"][0]["params"]
    monkeypatch.setattr("utils.optuna_search._score", lambda trial, *_: diverge(trial, calls.clear()))
    with pytest.raises(ValueError, match="all 2 diverged or were killed; lower learning_rate"):
        _search(splits, tmp_path / "b.json")


@pytest.mark.parametrize("rest", [b'{"op_code":4,"worker', b"\x00\x00\x00", b'{"op_code":4,"worker_id":"x"}'])
def test_half_an_entry_is_put_aside(rest: bytes, splits, tmp_path: Path) -> None:
    journal, first = _journal_of(tmp_path, splits)
    whole = journal.read_bytes()
    journal.write_bytes(whole + rest)
    with pytest.warns(UserWarning, match="half-written entries"):
        again = _search(splits, tmp_path / "b.json", journal=journal)
    assert again["params"] == first["params"] and journal.read_bytes().startswith(whole)
    assert rest in journal.with_name("journal.log.torn").read_bytes()


def test_an_entry_behind_half_of_another_is_saved(splits, tmp_path: Path) -> None:
    journal, first = _journal_of(tmp_path, splits)
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[3] = b'{"op_code":8,"wor' + lines[3]
    journal.write_bytes(b"".join(lines))
    with pytest.warns(UserWarning, match="half-written"):
        again = _search(splits, tmp_path / "b.json", journal=journal)
    assert again["params"] == first["params"] and again["trials"] == {"complete": 2}
    journal.write_bytes(b"".join([lines[0], b"something else\n", *lines[1:]]))
    with pytest.raises(ValueError, match="line 2.* no entry of a search"):
        _search(splits, tmp_path / "c.json", journal=journal)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        _search(splits, tmp_path / "d.json", journal=tmp_path)


@pytest.mark.parametrize(
    "content", [b"my notes", b'{"a": 1}\n', b'{"op_code": 99, "worker_id": "x"}\n', b"[]\n", b"\x89PNG\r\n"]
)
def test_somebody_elses_file_is_no_journal_and_is_left_as_it_is(content: bytes, tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_bytes(content)
    with pytest.raises(ValueError, match=r"mine.txt.*entry.* of a search; use another journal file"):
        open_journal(mine)
    assert mine.read_bytes() == content and not (tmp_path / "mine.txt.torn").exists()


def test_a_result_that_cannot_be_written_is_named_before_the_first_trial(splits, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("utils.optuna_search._score", None)
    with pytest.raises(IsADirectoryError, match="is a folder; name a file"):
        _search(splits, tmp_path)


def test_locks_that_a_kill_left_hold_nobody_up(splits, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for suffix in (".lock", ".guard", ".worker0"):
        Path(f"journal.log{suffix}").touch()
    Path("journal.log.lock").unlink()
    Path("journal.log.lock").symlink_to("nowhere")
    found = _search(splits, tmp_path / "a.json", journal="journal.log")
    assert found["trials"] == {"complete": 2}


KILLED = """
import os, sys
from utils import optuna_search
optuna_search._score = lambda *_: os._exit(9)
from models.def_models import build_model
from utils.data.sets import load_splits
optuna_search.optuna_search(
    lambda: build_model("resnet34", image_size=32), load_splits(sys.argv[1]), num_epochs=1, n_trials=2,
    out="x.json", space={"learning_rate": ("log", 1e-4, 1e-2)}, seed=1, journal=sys.argv[2], worker=3,
)
"""


def test_a_killed_default_trial_is_tried_again(phantoms, tmp_path: Path) -> None:
    splits = split_and_save(phantoms, group_by_subject(phantoms), split="patient", out=tmp_path / "data")
    journal = tmp_path / "journal.log"
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "data"), str(journal)]
    assert subprocess.run(arguments, cwd=ROOT, capture_output=True).returncode == 9
    found = optuna_search(
        lambda: build_model("resnet34", image_size=32),
        splits,
        num_epochs=1,
        n_trials=2,
        out=tmp_path / "a.json",
        space={"learning_rate": ("log", 1e-4, 1e-2)},
        seed=1,
        journal=journal,
        worker=4,
    )
    assert found["trials"] == {"complete": 2, "fail": 1}
    assert [trial["params"]["learning_rate"] for trial in found["history"][:2]] == [TrainConfig().learning_rate] * 2


def test_two_live_workers_need_two_numbers(splits, tmp_path: Path) -> None:
    with at_work(tmp_path / "journal.log", 0), pytest.raises(ValueError, match="worker 0 is at work"):
        _search(splits, tmp_path / "a.json", journal=tmp_path / "journal.log")


@pytest.mark.parametrize("wrong", [{"n_trials": 0}, {"num_epochs": 0}, {"worker": -1}, {"clean_floor": float("nan")}])
def test_counts_are_checked_before_any_work(wrong: dict, splits, tmp_path: Path) -> None:
    def never():
        pytest.fail("work has begun")

    arguments = {"num_epochs": 1, "n_trials": 1, "out": tmp_path / "a.json"} | wrong
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        optuna_search(never, splits, **arguments)


def test_importance_needs_ten_finished_trials(splits, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("utils.optuna_search._score", lambda trial, *_: (trial.params["learning_rate"], None))
    monkeypatch.setattr("optuna.trial.Trial.set_user_attr", _both_attrs)
    for n, known in ((9, False), (10, True)):
        found = optuna_search(
            lambda: build_model("resnet34", image_size=32),
            splits,
            num_epochs=1,
            n_trials=n,
            out=tmp_path / f"{n}.json",
            space={"learning_rate": ("log", 1e-4, 1e-2), "weight_decay": ("log", 1e-4, 1e-2)},
        )
        assert bool(found["importance"]) == known


def _both_attrs(trial: optuna.Trial, key: str, value: object) -> None:
    """What :func:`_score` would have noted."""
    for name, own in ((key, value), ("clean", 0.5)):
        trial.storage.set_trial_user_attr(trial._trial_id, name, own)
