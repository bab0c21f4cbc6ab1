from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, ended, forked, small_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from utils.commands import predict as predict_command
from utils.commands import train as train_command
from utils.core.paths import atomic_write, file_digest, read_json, write_json
from utils.data.preparation import group_by_subject, split_and_save
from utils.experiments import fit, protocol
from utils.experiments.records import update_record
from utils.training.checkpoints import (
    RECORD,
    RESUME,
    WEIGHTS,
    hold,
    load_checkpoint,
    load_resume_state,
    read_record,
    save_checkpoint,
)
from utils.training.config import TrainConfig
from utils.training.loop import train

pytestmark = pytest.mark.usefixtures("small_backbone")
SETTINGS = {"num_epochs": 1, "batch_size": 32}


@pytest.fixture(scope="module")
def data(phantoms, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    split_and_save(phantoms, group_by_subject(phantoms), split="patient", out=folder)
    return folder


def _fit(data: Path, folder: Path, **options) -> dict:
    return fit.fit("small", data, folder, **{"image_size": 32, "settings": SETTINGS} | options)


def _killed(work: Callable[[], object]) -> None:
    """Do ``work`` in a process of its own that must not come to its end."""
    assert ended(forked(work)) == 9


def test_the_record_holds_note_classes_and_the_digest_of_the_weights(data: Path, tmp_path: Path) -> None:
    record = _fit(data, tmp_path / "model")
    assert record.note == "phantom demo, no medical meaning"
    assert record.weights_sha256 == file_digest(tmp_path / "model" / WEIGHTS)
    with safe_open(tmp_path / "model" / WEIGHTS, "pt") as opened:
        assert json.loads(opened.metadata()["model"])["classes"] == record.classes
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [RECORD, WEIGHTS]
    assert record.training.specification["weights"] == "scratch"


def test_a_split_with_patients_on_both_sides_is_noted(phantoms, tmp_path: Path) -> None:
    raw = replace(phantoms, name="archive")
    split_and_save(raw, group_by_subject(raw), split="random", out=tmp_path / "data")
    assert _fit(tmp_path / "data", tmp_path / "model").note.startswith("random split: patients are on both sides")


def test_another_size_than_that_of_the_start_is_refused(data: Path, tmp_path: Path, capsys) -> None:
    _fit(data, tmp_path / "start")
    words = ["--backbone", "small", "--data", str(data), "--start", str(tmp_path / "start"), "--set", "eps=2/255"]
    words += ["--set", "num_epochs=1", "--set", "batch_size=32", "--out", str(tmp_path / "hard")]
    assert train_command.main([*words, "--image-size", "64"]) == 1
    assert "sees 32 pixels, which hardening keeps" in capsys.readouterr().err and not (tmp_path / "hard").exists()
    assert train_command.main([*words, "--image-size", "32"]) == 0
    assert train_command.main([*words, "--image-size", "32"]) == 1
    assert "--overwrite" in capsys.readouterr().err


def test_killed_between_training_and_test_only_the_test_is_done(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _fit(data, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(fit, "evaluate", lambda *_: os._exit(9))
        _killed(lambda: _fit(data, tmp_path / "killed"))
    assert read_record(tmp_path / "killed").test is None
    with pytest.raises(FileExistsError, match=r"other num_epochs \(1, not 2\).*another folder"):
        _fit(data, tmp_path / "killed", settings=SETTINGS | {"num_epochs": 2})
    monkeypatch.setattr(fit, "train_and_save", None)
    assert _fit(data, tmp_path / "killed").test == whole.test
    with pytest.raises(FileExistsError, match="finished model"):
        _fit(data, tmp_path / "killed")


def _kill_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the process ends when a file ``name`` is about to be put in its place."""
    put = Path.replace

    def parted(self: Path, target: Path) -> Path:
        return os._exit(9) if Path(target).name == name else put(self, target)

    monkeypatch.setattr(Path, "replace", parted)


def test_weights_and_record_parted_by_a_kill_are_noticed_and_the_rerun_completes_them(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = tmp_path / "model", SETTINGS | {"seed": 1}
    old, wanted = _fit(data, folder), _fit(data, tmp_path / "whole", settings=other)
    with monkeypatch.context() as patch:
        _kill_before(RECORD, patch)
        _killed(lambda: _fit(data, folder, settings=other, overwrite=True))
    assert read_record(folder) == old and file_digest(folder / WEIGHTS) == wanted.weights_sha256
    with pytest.raises(ValueError, match=r"weights.safetensors is not the file.*SHA-256.*again"):
        load_checkpoint(folder)
    assert (folder / RESUME).is_file()
    again = _fit(data, folder, settings=other)
    assert again.test == wanted.test and again.weights_sha256 == wanted.weights_sha256
    assert sorted(path.name for path in folder.iterdir()) == [RECORD, WEIGHTS]


def test_weights_exchanged_by_hand_are_not_replaced_unasked(data: Path, tmp_path: Path) -> None:
    _fit(data, tmp_path)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, metadata={})
    with pytest.raises(FileExistsError, match="not those of its record"):
        _fit(data, tmp_path)
    assert _fit(data, tmp_path, overwrite=True).test


def test_weights_without_prefix_beside_a_valid_record_are_refused(data: Path, tmp_path: Path) -> None:
    record = _fit(data, tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    body = {name.removeprefix("backbone."): value for name, value in state.items() if ".out." not in name}
    save_file(body, tmp_path / WEIGHTS, metadata={"model": json.dumps(record.model.plain())})
    with pytest.raises(ValueError, match="SHA-256"):
        load_checkpoint(tmp_path)
    # records of before the digest have the names of the tensors to tell by
    write_json(tmp_path / RECORD, {name: value for name, value in record.plain().items() if name != "weights_sha256"})
    with pytest.raises(ValueError, match=r"does not fit small.*Missing.*backbone\.out"):
        load_checkpoint(tmp_path)


def test_records_of_before_the_digest_still_load(data: Path, tmp_path: Path) -> None:
    record = _fit(data, tmp_path)
    write_json(tmp_path / RECORD, {name: value for name, value in record.plain().items() if name != "weights_sha256"})
    assert load_checkpoint(tmp_path)[1].test == record.test


def test_another_process_that_trains_into_the_folder_is_named_at_once(data: Path, splits, tmp_path: Path) -> None:
    reading, writing = os.pipe()

    def train_long() -> None:
        with hold(tmp_path / "model"):
            os.write(writing, b"x")
            time.sleep(60)

    child = forked(train_long)
    try:
        os.read(reading, 1)
        state = tmp_path / "model" / RESUME
        state.parent.mkdir(parents=True)
        state.write_bytes(b"half")
        for start in (
            lambda: _fit(data, tmp_path / "model"),
            lambda: train(small_model(), splits, config=TrainConfig(**SETTINGS), folder=tmp_path / "model"),
        ):
            with pytest.raises(BlockingIOError, match="another process is training into .*model"):
                start()
        assert state.read_bytes() == b"half"
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    state.unlink()
    with hold(tmp_path / "model"), hold(tmp_path / "model"):  # a kill lets go of it, and a process may hold it twice
        pass


def test_what_a_kill_left_half_written_goes_with_the_next_write(tmp_path: Path) -> None:
    def killed(path: Path) -> None:
        path.write_bytes(b"half")
        os._exit(9)

    _killed(lambda: atomic_write(tmp_path / WEIGHTS, killed))
    (left,) = tmp_path.iterdir()
    living = tmp_path / left.name.replace(f"-{left.name.split('-')[1].split('.')[0]}.", f"-{os.getppid()}.")
    living.write_bytes(b"still being written")
    foreign = tmp_path / ".weights.safetensors.00000000-1.abc.tmp"
    foreign.write_bytes(b"of another machine")
    write_json(tmp_path / "other.json", {})
    assert not left.exists() and living.exists() and foreign.exists()
    os.utime(foreign, (0, 0))
    write_json(tmp_path / "other.json", {})
    assert not foreign.exists() and living.exists()


def test_the_second_start_does_not_delete_the_half_written_state_of_the_first(tmp_path: Path) -> None:
    def look(path: Path) -> None:
        assert ended(forked(lambda: load_resume_state(tmp_path, {}))) == 0
        path.write_bytes(b"whole")

    atomic_write(tmp_path / RESUME, look)
    assert (tmp_path / RESUME).read_bytes() == b"whole"


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints/X/.weights.safetensors.ab12",
        "checkpoints/X/.record.json.0badc0de-12.x.tmp",
        "dataset/dataset_variables/.train_set.pt.ab12",
        "somewhere/.train_set.pt.0badc0de-12.x.tmp",
        "benchmarks/recipes/x/.clean_seed0.json.0badc0de-12.x.tmp",
        "checkpoints/.ResNet34.lock",
        "checkpoints/X/resume/state.pt",
    ],
)
def test_git_ignores_what_a_kill_leaves(name: str) -> None:
    assert subprocess.run(["git", "-C", str(ROOT), "check-ignore", "-q", name]).returncode == 0


def test_a_diverging_training_ends_in_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def diverge(*_args, **_options) -> None:
        raise FloatingPointError("the training loss became nan in epoch 1; lower learning_rate")

    monkeypatch.setattr(protocol, "train", diverge)
    assert (
        train_command.main(["--backbone", "small", "--data", str(data), "--out", str(tmp_path), "--image-size", "32"])
        == 1
    )
    error = capsys.readouterr().err
    assert error == "error: the training loss became nan in epoch 1; lower learning_rate\n"


def test_what_train_leaves_answers_at_once_about_a_scan(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--backbone", "small", "--data", str(data), "--out", str(tmp_path / "own"), "--image-size", "32"]
    assert train_command.main([*arguments, "--set", "num_epochs=1"]) == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("ready for python -m utils ").split()
    command[command.index("SCAN")] = "phantom"
    assert predict_command.main([*command[1:], "--out", str(tmp_path / "answers")]) == 0
    assert list((tmp_path / "answers").rglob("*.json"))


def test_an_epoch_takes_eight_slices_of_each_patient_unless_told_otherwise(data: Path, tmp_path: Path) -> None:
    shared = ["--backbone", "small", "--data", str(data), "--image-size", "32", "--set", "num_epochs=1"]
    for name, more, wanted in (("a", [], 8), ("b", ["--set", "slices_per_patient=2"], 2)):
        assert train_command.main([*shared, *more, "--out", str(tmp_path / name)]) == 0
        assert read_record(tmp_path / name).trained.config.slices_per_patient == wanted


def test_weights_of_our_own_with_other_classes_are_refused(data: Path, tmp_path: Path) -> None:
    record = _fit(data, tmp_path / "first")
    model, _ = load_checkpoint(tmp_path / "first")
    save_checkpoint(model, {"classes": record.classes[::-1]}, tmp_path / "other")
    with pytest.raises(ValueError, match=f"{', '.join(record.classes[::-1])}, in this order"):
        _fit(data, tmp_path / "second", weights=str(tmp_path / "other" / WEIGHTS))
    assert _fit(data, tmp_path / "second", weights=str(tmp_path / "first")).training.start == "first"


def test_an_update_keeps_the_digest(data: Path, tmp_path: Path) -> None:
    digest = _fit(data, tmp_path).weights_sha256
    update_record(tmp_path, extra=1)
    assert read_json(tmp_path / RECORD)["weights_sha256"] == digest
    assert torch.isfinite(load_checkpoint(tmp_path)[0].backbone.out.weight).all()


def test_a_file_where_the_model_should_go_is_said_before_training(data: Path, tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(NotADirectoryError, match="choose another folder"):
        _fit(data, tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recipe": "tradess"}, "recipe 'tradess' is not one of adversarial, trades"),
        ({"recipe": "tradess", "start": "anywhere"}, "recipe 'tradess' is not one of"),
        ({"recipe": "trades"}, "recipe trades hardens a trained model; give the folder of one as start"),
    ],
)
def test_a_recipe_is_not_ignored(data: Path, tmp_path: Path, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _fit(data, tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()
