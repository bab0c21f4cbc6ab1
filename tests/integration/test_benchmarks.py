"""The benchmarks run and compare like with like; how fast anything is depends on the machine and is not tested."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_model

from benchmarks import (
    attack_speed,
    attention_speed,
    bad_scans,
    near_training,
    patient_signal,
    scans,
    training_speed,
    whole_processes,
)
from benchmarks.measure import gpu_use, sampled, take_turns
from models.def_models import build_model
from utils.core.paths import read_json
from utils.core.precision import emulates_bf16
from utils.data.corruptions import CORRUPTIONS
from utils.data.phantom import PhantomConfig, make_phantoms
from utils.data.preparation import group_by_subject, split_and_save
from utils.data.raw_images import RawImages
from utils.data.scans.volume import Volume
from utils.data.sets import DataSplits, load_splits
from utils.evaluation.gate import fit_gate
from utils.evaluation.leak_audit import highest_correlations
from utils.reporting.benchmark_tables import (
    attack_speed_table,
    attention_speed_table,
    bad_scans_table,
    gate_attacked_table,
    gate_table,
    heads_table,
    near_training_table,
)
from utils.reporting.style import save_figure
from utils.training.checkpoints import save_checkpoint
from utils.training.objectives import Adversarial
from utils.training.record import parse_record

pytestmark = pytest.mark.usefixtures("small_backbone")


@pytest.fixture
def root(phantoms: RawImages, tmp_path: Path) -> Path:
    splits = split_and_save(phantoms, group_by_subject(phantoms), out=tmp_path / "data")
    save_checkpoint(
        small_model(), {"classes": splits.classes, "data": splits.info}, tmp_path / "checkpoints" / "ResNet34"
    )
    return tmp_path


def test_contenders_take_turns_and_the_first_turn_does_not_count() -> None:
    order: list[str] = []
    found = take_turns({name: lambda name=name: order.append(name) or name for name in "ab"}, repeats=2)
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert len(found["a"].seconds) == 2 and found["b"].results == ["b", "b"] and found["a"].peak_mib >= 0


def test_all_attacks_leave_the_same_accuracy(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a radius at which the untrained model falls for some images and not for others
    monkeypatch.setattr(attack_speed, "EPS", 2 / 255)
    arguments = ["--root", str(root), "--suite", "smoke", "--images", "16", "--few-images", "8", "--repeats", "1"]
    assert attack_speed.main([*arguments, "--out", str(root / "out")]) == 0
    record = read_json(root / "out" / "attack_speed.json")
    rows = record["models"]["ResNet34"]["rows"]
    assert set(rows["PGD-10"]) >= {"ours", "ours, every image", "torchattacks"}
    assert ("ours, bf16" in rows["PGD-10"]) != emulates_bf16("cpu")
    for row in rows.values():
        assert "ours, compiled" not in row
        left = {own["robust_accuracy"] for own in row.values()}
        # one image of sixteen, for random starts differ
        assert max(left) - min(left) <= 1 / 16 and all(own["seconds"] > 0 for own in row.values())
    assert record["environment"]["threads"] >= 1 and (root / "out" / "attack_speed.png").is_file()


def test_a_whole_evaluation_leaves_what_its_attacks_leave_one_by_one(root: Path) -> None:
    arguments = ["--root", str(root), "--suite", "quick", "--rows", "grid", "--few-images", "16", "--name", "whole"]
    assert attack_speed.main([*arguments, "--out", str(root / "out")]) == 0
    record = read_json(root / "out" / "whole.json")
    ((title, row),) = record["models"]["ResNet34"]["rows"].items()
    assert title == "suite quick, eps 0.5 to 8/255"
    left = [own["robust_accuracy"] for own in row.values()]
    # a mean over six radii: one image that a random start decides, at one radius of them
    assert 0 < max(left) < 1 and max(left) - min(left) <= 2 / 96
    # one at first; at each radius FGSM takes one step, PGD twenty, and each is followed by one without gradient
    images, radii = record["models"]["ResNet34"]["images"][title], 6
    assert row["ours, every image"]["image_passes"] == images * (1 + radii * (1 + 1 + 20 + 1))
    assert 0 < row["ours"]["image_passes"] < row["ours, every image"]["image_passes"]
    table = attack_speed_table(record)
    assert f"{images} images for {title}" in table and "eps 2/255" not in table


def test_compiled_models_take_part_when_asked_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # traced as ever, without the C++ compiler, which takes a minute; tests/unit/test_worst_case.py waits for it
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    arguments = ["--root", str(root), "--suite", "smoke", "--rows", "suite", "--few-images", "8", "--compile"]
    assert attack_speed.main([*arguments, "--out", str(root / "out")]) == 0
    model = read_json(root / "out" / "attack_speed.json")["models"]["ResNet34"]
    (row,) = model["rows"].values()
    assert model["compile_seconds"] > 0
    assert row["ours, compiled"]["image_passes"] is None
    assert abs(row["ours, compiled"]["robust_accuracy"] - row["ours"]["robust_accuracy"]) <= 1 / 8


def test_attack_speed_says_where_it_looked_for_models(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert attack_speed.main(["--root", str(tmp_path)]) == 1
    assert str(tmp_path / "checkpoints") in capsys.readouterr().err


def test_floor_does_the_passes_of_the_recipe_and_nothing_else(splits: DataSplits, tmp_path: Path) -> None:
    for name, (objective, steps) in training_speed.recipes().items():
        assert (objective.attacks, getattr(objective, "steps", 0)) == (steps > 0, steps), name
        if isinstance(objective, Adversarial):
            assert objective.adv_weight == 1 and objective.strength(0.0)["steps"] == steps
    arguments = ["--backbones", "small", "--image-size", "32", "--images", "16", "--batch-size", "8"]
    assert training_speed.main([*arguments, "--repeats", "1", "--out", str(tmp_path)]) == 0
    found = read_json(tmp_path / "training_speed.json")["backbones"]["small"]
    assert found["train_images"] == 16 and found["times_clean"]["clean"] == 1
    assert set(found["times_floor"]) == set(training_speed.recipes())


def test_both_ways_of_attention_give_the_same_gradient(tmp_path: Path) -> None:
    arguments = ["--image-sizes", "42", "--batch-size", "2", "--repeats", "1", "--out", str(tmp_path)]
    assert attention_speed.main(arguments) == 0
    record = read_json(tmp_path / "attention_speed.json")
    (found,) = record["sizes"]
    assert found["cosine"]["fp32"] > 0.9999 and found["cosine"]["bf16"] > 0.99
    rows = attention_speed_table(record).splitlines()[2:4]
    assert [row.split("|")[2].strip() for row in rows] == ["fp32", "bf16"]
    assert float(rows[1].split("|")[5]) == pytest.approx(found["times_fused"]["bf16"], abs=0.005)


def test_a_watcher_is_read_while_a_run_lasts(tmp_path: Path) -> None:
    watch = """
import pathlib, sys, time
while True:
    print(sys.argv[2], flush=True)
    pathlib.Path(sys.argv[1]).touch()
    time.sleep(0.01)
"""

    def until_told(says: str) -> list[float]:
        told = tmp_path / says[:2]
        return sampled(lambda: _wait_for(told), [sys.executable, "-c", watch, str(told), says])

    numbers = until_told("no number\n7")
    assert numbers and set(numbers) == {7.0}
    with pytest.raises(RuntimeError, match="a broken GPU"):
        until_told("a broken GPU")
    assert torch.cuda.is_available() or gpu_use(lambda: None) is None


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)


def test_a_process_that_fails_says_why() -> None:
    seconds, peak = whole_processes.run_process(["-c", "x = bytearray(50_000_000)"])
    assert seconds > 0 and 50 < peak < 1000
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        whole_processes.run_process(["-c", "1 / 0"])


def test_growth_is_measured_on_parts_of_the_source() -> None:
    raw = make_phantoms(PhantomConfig(n_subjects=12, n_levels=4))
    found = whole_processes.growth_by_images(raw, [24, 48])
    assert all(list(seconds) == [24, 48] and min(seconds.values()) > 0 for seconds in found.values())
    whole_processes.growth_figure(found, {1: 2.0, 2: 1.1}, "note")


def test_readers_learn_from_patients_what_the_label_follows(splits: DataSplits, tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    demented = np.arange(60) % 2 == 1
    told = draws.normal(size=(60, 3)) + 2 * demented[:, None]
    found = patient_signal.auroc_by_patients(told, demented, repeats=2, seed=0)
    assert list(found) == [20, 40, 48] and min(found[48]) > 0.9
    noise = patient_signal.auroc_by_patients(draws.normal(size=(60, 3)), demented, repeats=2, seed=0)
    assert 0.2 < np.mean(noise[48]) < 0.75
    weights = tmp_path / "encoder.pth"
    torch.save(build_model("dino_v2", image_size=42).backbone.state_dict(), weights)
    features = patient_signal.read_slices(splits.train, weights, 42)
    patients = len(splits.train.subjects.unique())
    assert {len(own) for own in features.values()} == {patients}
    with pytest.raises(ValueError, match="same number of slices"):
        patient_signal.read_slices(splits.train.subset(torch.arange(1, len(splits.train))), weights, 42)
    assert features["frozen encoder"].shape[1] % 768 == 0 and features["ventricles and sulci"].shape[1] == 2


def test_accuracy_is_told_by_resemblance_to_training(phantoms: RawImages, tmp_path: Path) -> None:
    splits = split_and_save(phantoms, group_by_subject(phantoms), out=tmp_path / "data")
    few = splits.test.balanced_subset(10)
    resemblance = highest_correlations(splits.train, few)
    # right without attack where it resembles more than half of the others do; some of those fall at the first radius
    order = np.argsort(np.argsort(resemblance))
    first = np.where(order < 5, 0, np.where(order < 7, 1, -1)).tolist()
    curve = {"title": "x", "attacks": [], "threat": {"title": "x"}, "n_subjects": 1, "seconds": 1.0}
    curve |= {"epsilons": [0.0, 0.005], "robust_accuracy": [0.5, 0.3], "rounded_accuracy": [None, None]}
    curve |= {"n_images": len(few), "first_broken": first, "broken_by": first, "max_norm": [0.0, 0.005]}
    worst = {"curve": curve, "interval": [], "metrics": [], "answers": {"probability": [], "right": []}, "panel": None}
    content = {"model": {"backbone": "resnet34", "num_classes": 4, "image_size": 32}, "data": splits.info}
    record = parse_record(content | {"worst_case": worst}, "x")
    found = near_training.right_by_resemblance({"ResNet34": record}, splits)
    own = found["models"]["ResNet34"]
    assert own["0.0"][:5] == [0, 0, 0.5, 1, 1] and own["0.005"][:5] == [0, 0, 0, 0.5, 1]
    # no patient is on both sides, so no slice has its neighbour in training
    assert [group["n"] for group in found["groups"]] == [2] * 5 + [0, 10]
    assert own["0.0"][5:] == [None, 0.5] and own["0.005"][5:] == [None, 0.3]
    assert found["groups"][0]["name"].startswith(f"{resemblance.min():.3f} to ")
    near_training.resemblance_figure(found, "note")
    table = near_training_table(found | {"data": {"source": "phantom", "protocol": "patient"}})
    assert "| ResNet34, 0.005 | 0.0 | 0.0 | 0.0 | 50.0 | 100.0 | - | 30.0 |" in table
    with pytest.raises(ValueError, match="not attacked at 0.005"):
        other = parse_record(content | {"worst_case": worst | {"curve": curve | {"epsilons": [0.0, 0.01]}}}, "x")
        near_training.right_by_resemblance({"ResNet34": other}, splits)
    other = parse_record(content | {"data": splits.info | {"fingerprint": "x"}, "worst_case": worst}, "x")
    with pytest.raises(ValueError, match="other data"):
        near_training.right_by_resemblance({"ResNet34": other}, splits)
    with pytest.raises(ValueError, match="_atk notebook"):
        near_training.right_by_resemblance({"ResNet34": parse_record(content, "x")}, splits)


def test_resemblance_needs_trained_models(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--data", str(root / "data"), "--out", str(tmp_path / "out")]
    assert near_training.main([*arguments, "--root", str(tmp_path / "empty")]) == 1
    assert "no trained model" in capsys.readouterr().err
    assert near_training.main([*arguments, "--root", str(root)]) == 1
    assert "holds no attack" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_bad_scans_are_noticed_and_good_ones_mostly_not(splits, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bad_scans, "CORRUPTIONS", {kind: CORRUPTIONS[kind] for kind in ("blur", "ghosting")})
    monkeypatch.setattr(bad_scans, "load_splits", lambda _: splits)
    assert bad_scans.main(["--out", str(tmp_path)]) == 0
    found = read_json(tmp_path / "bad_scans.json")
    assert set(found["noticed"]) == {"as scanned", "blur", "ghosting"} and (tmp_path / "bad_scans.png").is_file()
    assert found["noticed"]["as scanned"][0] <= 0.5 and found["noticed"]["blur"][-1] == 1
    for kind, shares in found["noticed"].items():
        assert all(own >= alone for own, alone in zip(shares, found["by_distance"][kind]))
    table = bad_scans_table(found)
    assert "| blur | 100 / " in table and f"{found['patients']} test patients, 4 slices each" in table
    monkeypatch.setattr(bad_scans, "load_splits", load_splits)
    assert bad_scans.main(["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    assert "error: " in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_gate_is_measured_on_foreign_images_and_attacked(
    splits, tmp_path: Path, small_backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scans, "MANY", 12)
    ball = np.linalg.norm(np.indices((181, 217, 181)).T - [90, 108, 90], axis=3).T
    head = Volume("head", (ball < 80) * (200 - ball.astype(np.float32)), np.eye(4))
    sets = scans.foreign_sets(splits.test, head, head, seed=0)
    assert {len(images) for name, images in sets.items() if name not in ("whole head", "black")} >= {12}
    assert all(
        images.shape[1:] == (1, 128, 128) and images.min() >= 0 and images.max() <= 1 for images in sets.values()
    )
    gate = fit_gate(splits.train, splits.validation)
    found = scans.measure_gate(gate, splits, sets, [])
    assert found["auroc"]["gate"]["uniform noise"] == found["refused"]["uniform noise"] == 1
    assert found["auroc"]["gate"]["inverted"] > 0.97 and found["test"]["patients_refused"] <= 0.2
    save_figure(scans.gate_figure(found, "phantoms"), tmp_path / "gate.png")
    heads = {"levels": {"one": [0.9, 0.95]}, "fit": {}, "agreement": [0.97]}
    monkeypatch.setattr(scans, "load_checkpoint", lambda folder: (small_model(), None))
    attacked = scans.attack_gate(gate, splits.test, sets, ["small"], 0)
    # a gate that is attacked tells no more foreign images than one that is not
    assert all(attacked["refused"][name] <= found["refused"][name] for name in sets)
    assert all(attacked["auroc"][name] <= found["auroc"]["gate"][name] + 1e-6 for name in sets)
    assert attacked["refused"]["uniform noise"] == 1 and attacked["test_refused"] == sorted(attacked["test_refused"])
    assert all(0 <= share <= 1 for share in attacked["models"]["small"]["misclassified_and_accepted"])
    record = {
        "gate": found | {"attacked": attacked},
        "heads": heads | {"wrong_turns": [{"correlation": 0.8, "overlap": 0.7}]},
    }
    record |= {"volumes": ["a.nii", "b.nii"], "data": splits.info}
    assert "| uniform noise | 12 | 100.0 % | 1.000 | 100.0 % | 1.000 |" in gate_table(record)
    assert gate_attacked_table(record).count("\n| ") == 3 + 1
    assert "| one | 0.900 to 0.950 | - | - |" in heads_table(record) and "at most 0.800" in heads_table(record)
