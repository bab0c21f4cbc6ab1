"""Whole patients as one image: stacks, what reads them, and attacks on all slices of a patient together."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import small_model
from sklearn.metrics import roc_auc_score
from torch import nn

from tests.toy import EPS, toy_images, train_toy
from utils.attacks.suites import SUITES
from utils.commands.combine import main as combine_command
from utils.commands.folds import main as folds_command
from utils.core.parts import read_part
from utils.core.paths import file_digest, read_json, write_json
from utils.data.classes import CLASSES
from utils.data.preparation import group_by_subject, split_and_save
from utils.data.sets import ImageSet, load_splits
from utils.data.stacks import patient_stacks
from utils.data.subject_ids import UNKNOWN
from utils.evaluation.baselines import BASELINES, baseline_answers
from utils.evaluation.by_patient import Blend, MeanOfSlices, PooledFeatures, Stacked, Tempered, answers_of
from utils.evaluation.metrics import illness_by_patient, merge_by_patient, predict
from utils.evaluation.worst_case import robustness_curve
from utils.experiments.combine import ill_or_not, verdict_of
from utils.experiments.fold_records import FoldsSummary
from utils.experiments.folds import fold_of, read_fold
from utils.reporting.combinations import combinations_table
from utils.training.checkpoints import WEIGHTS
from utils.training.pooling import fit_pool, fit_stack, fit_temperature, slice_features


def test_a_stack_holds_a_patients_slices_in_order_whatever_order_they_come_in() -> None:
    images = toy_images(32, seed=0)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    stacks = patient_stacks(images.subset(order), 8)
    assert stacks.images.shape == (4, 8, 16, 16) and stacks.subjects.tolist() == [0, 1, 2, 3]
    assert torch.equal(stacks.images[2], images.images[16:24, 0]) and stacks.labels.tolist() == [0, 1, 2, 3]
    few = patient_stacks(images, 3)
    assert torch.equal(few.images[0], images.images[[1, 4, 6], 0])
    more = patient_stacks(images, 16)
    assert torch.equal(more.images[0], images.images[:8, 0].repeat_interleave(2, 0))
    images.subjects[:8] = UNKNOWN
    assert len(patient_stacks(images, 2)) == 3
    images.slices[9] = -1
    with pytest.raises(ValueError, match="order of the slices of patient 1"):
        patient_stacks(images, 2)
    images.subjects[:] = UNKNOWN
    with pytest.raises(ValueError, match="no patient is known"):
        patient_stacks(images, 2)


def test_the_mean_of_slices_is_the_mean_that_the_metrics_take(toy_nets) -> None:
    images = toy_images(64, seed=5)
    stacked = predict(MeanOfSlices(toy_nets["plain"]), patient_stacks(images, 8)).exp()
    means, labels = merge_by_patient(predict(toy_nets["plain"], images).softmax(1), images)
    assert torch.allclose(stacked, means, atol=1e-6) and labels.tolist() == patient_stacks(images, 8).labels.tolist()


def _ramps(n: int, seed: int) -> ImageSet:
    """Patients whose slices grow brighter (class 0) or darker (class 1): the same slices in another order."""
    draws = torch.Generator().manual_seed(seed)
    levels = torch.linspace(40, 200, 6)
    rows = [levels if patient % 2 == 0 else levels.flip(0) for patient in range(n)]
    pixels = torch.stack(rows).flatten()[:, None, None, None] + 8 * torch.randn(6 * n, 1, 32, 32, generator=draws)
    subjects = torch.arange(6 * n) // 6
    return ImageSet(
        pixels.clamp(0, 255).byte(),
        subjects % 2,
        subjects,
        torch.arange(6 * n) % 6,
        torch.zeros(6 * n, dtype=torch.bool),
        [f"{number}.png" for number in range(6 * n)],
        ["up", "down"],
        {"protocol": "patient", "source": "toy", "fingerprint": "ramps"},
    )


def test_order_matters_to_the_gru_and_not_to_attention_or_mean(small_backbone) -> None:
    model = small_model().eval()
    train, test = (patient_stacks(_ramps(n, seed), 6) for n, seed in ((40, 1), (20, 2)))
    mean = MeanOfSlices(model)
    accuracy = {}
    for pool in ("attention", "gru"):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        fitted = fit_pool(model, pool, train, test, seed=0)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        accuracy[pool] = (predict(fitted, test).argmax(1) == test.labels).float().mean().item()
        pixels = test.pixels(slice(0, 4))
        moved = (fitted(pixels) - fitted(pixels.flip(1))).abs().max().item()
        assert (moved > 0.1) == (pool == "gru")
    assert accuracy["gru"] == 1 and accuracy["attention"] < 0.8
    pixels = test.pixels(slice(0, 4))
    assert torch.allclose(mean(pixels), mean(pixels.flip(1)), atol=1e-5)
    again = fit_pool(model, "gru", train, test, seed=0)
    assert torch.equal(predict(again, test), predict(fitted, test))
    with pytest.raises(ValueError, match="pool must be one of attention, gru"):
        PooledFeatures(model, "max", num_classes=2, n_features=128)


def test_features_are_what_the_head_reads(small_backbone) -> None:
    model = small_model().eval()
    images = torch.rand(3, 1, 32, 32)
    head = model.backbone.get_submodule(model.head_name)
    assert torch.allclose(head(model.features(images)), model(images), atol=1e-6)
    stacks = patient_stacks(_ramps(4, 0), 6)
    assert slice_features(model, stacks, batch_size=3).shape == (4, 6, 128)


def test_all_slices_of_a_patient_are_attacked_together(toy_nets) -> None:
    """On a patient the attack must turn the mean of all slices, and it finds more than one that attacks them apart."""
    images = toy_images(320, seed=6)
    stacks = patient_stacks(images, 8)
    for name in ("plain", "hardened"):
        patient = MeanOfSlices(toy_nets[name])
        curve = robustness_curve(patient, stacks, attack=SUITES["brief"], epsilons=[EPS / 2, EPS])
        assert curve.n_images == 40 and curve.robust_accuracy[0] == 1
        assert curve.robust_accuracy == sorted(curve.robust_accuracy, reverse=True)
        alone = robustness_curve(toy_nets[name], images, attack=SUITES["brief"], epsilons=[EPS / 2, EPS])
        merged, labels = merge_by_patient(alone.logits[2].softmax(1), images)
        apart = (merged.argmax(1) == labels).double().mean().item()
        assert curve.robust_accuracy[2] <= apart + 1e-9
        assert max(curve.max_norm) <= EPS * (1 + 1e-4) + 1e-6
    assert curve.robust_accuracy[2] > 0  # the hardened net is left something


def test_stacks_of_models_begin_as_their_mean_and_learn_whom_to_believe() -> None:
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (400,), generator=draws)
    knows = (3 * nn.functional.one_hot(labels, 3) + torch.randn(400, 3, generator=draws)).log_softmax(-1)
    guesses = (2 * torch.randn(400, 3, generator=draws)).log_softmax(-1)
    weight, bias = fit_stack([knows, guesses], labels)
    assert weight.shape == (3, 6) and bias.shape == (3,)
    said = torch.cat([knows, guesses], 1) @ weight.T + bias
    mean = (knows.exp() + guesses.exp()) / 2
    assert (said.argmax(1) == labels).sum() > (mean.argmax(1) == labels).sum()
    assert weight[:, :3].diagonal().mean() > 2 * weight[:, 3:].diagonal().mean()
    few, _ = fit_stack([knows[:2], guesses[:2]], labels[:2])
    assert (few - torch.cat([torch.eye(3)] * 2, 1) / 2).abs().max() < 0.2  # two patients move it little


def test_combinations_are_models_of_patients() -> None:
    nets = [train_toy(seed=seed, steps=40) for seed in (0, 1)]
    stacks = patient_stacks(toy_images(64, seed=7), 4)
    members = [MeanOfSlices(net) for net in nets]
    answers = [predict(member, stacks) for member in members]
    blend = predict(Blend(members, [0.25, 0.75]), stacks)
    assert torch.allclose(blend.exp(), 0.25 * answers[0].exp() + 0.75 * answers[1].exp(), atol=1e-5)
    weight, bias = fit_stack(answers, stacks.labels)
    stacked = predict(Stacked(members, weight, bias).eval(), stacks)
    assert torch.allclose(stacked.exp().sum(1), torch.ones(len(stacks))) and stacked.shape == blend.shape
    for shares in ([0.5, 0.6], [1.0], [-0.5, 1.5]):
        with pytest.raises(ValueError, match="nonnegative numbers with sum 1"):
            Blend(members, shares)


def test_readings_of_one_network_look_at_each_slice_once(small_backbone) -> None:
    model = small_model().eval()
    pools = [PooledFeatures(model, pool, num_classes=4, n_features=128).eval() for pool in ("attention", "gru")]
    members = [MeanOfSlices(model), *pools, MeanOfSlices(small_model().eval())]
    pixels = torch.rand(3, 6, 32, 32, requires_grad=True)
    passes: list[int] = []
    model.register_forward_pre_hook(lambda _, given: passes.append(len(given[0])))
    said = answers_of(members, pixels)
    assert passes == [18]
    for member, own in zip(members, said, strict=True):
        assert torch.allclose(own, member(pixels), atol=1e-6)
    together = torch.autograd.grad(torch.stack(said).sum(), pixels)[0]
    apart = torch.autograd.grad(sum(member(pixels).sum() for member in members), pixels)[0]
    assert torch.allclose(together, apart, atol=1e-6)


def test_a_temperature_undoes_what_makes_answers_too_sure() -> None:
    draws = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 4, generator=draws)
    labels = torch.multinomial(logits.softmax(1), 1, generator=draws)[:, 0]
    assert fit_temperature(3 * logits, labels) == pytest.approx(3, rel=0.06)
    assert fit_temperature(logits, labels) == pytest.approx(1, rel=0.06)
    model = Tempered(nn.Identity(), 3.0)
    assert torch.allclose(model(3 * logits), logits)
    sure = fit_temperature(torch.eye(4) * 5, torch.arange(4))
    assert 0.04 < sure < 1  # all right: as sure as it may become
    # right by so little that the search leaves all bounds, and wrong by it
    little = torch.tensor([[-0.00038, 0.00038], [0.00038, -0.00038]] * 8)
    right = torch.tensor([1, 0] * 8)
    assert fit_temperature(little, right) == pytest.approx(math.exp(-3))
    assert fit_temperature(little, 1 - right) == pytest.approx(math.exp(3))
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match="above 0"):
            Tempered(nn.Identity(), bad)
    with pytest.raises(ValueError, match="at least one"):
        fit_temperature(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))


def test_the_command_combines_the_models_of_the_folds(small_backbone, phantoms, tmp_path: Path, capsys) -> None:
    split_and_save(phantoms, group_by_subject(phantoms), split="patient", out=tmp_path / "data")
    shared = ["--data", str(tmp_path / "data"), "--n-folds", "3", "--folds", "1", "--work", str(tmp_path / "work")]
    small = ["--clean-epochs", "1", "--epochs", "1", "--train-steps", "1", "--validation-images", "8"]
    for name in ("a", "b"):
        small += ["--seed", "0", "--max-images", "8", "--suite", "smoke", "--backbone", "small"]
        assert folds_command([*shared, *small, "--out", str(tmp_path / name)]) == 0
    words = [*shared, "--members", "a", "b", "--out", str(tmp_path / "both"), "--n-slices", "2", "--suite", "smoke"]
    assert combine_command(words) == 0
    record = read_fold(tmp_path / "both" / "fold1.json")
    own = {f"{name}, {pool}, hardened" for name in "ab" for pool in ("mean", "attention", "GRU")}
    together = {f"{kind} of all, hardened" for kind in ("soft vote", "blend", "stack")}
    assert set(record.models) == own | together
    assert record.classes == ["healthy", "ill"] and record.specification["question"] == "ill"
    # each decides at its own threshold: the order of the two logits is the verdict
    assert all(len(answer) == 2 for model in record.models.values() for answer in model.logits)
    n = len(record.test.subjects)
    assert len(set(record.test.subjects)) == n and all(len(model.attacked[2]) == n for model in record.models.values())
    assert all(model.temperature > 0 for model in record.models.values())
    own_fold = fold_of(load_splits(tmp_path / "data"), 1, 3, 0)
    assert set(record.baselines) == set(BASELINES)
    for name, logits in baseline_answers(own_fold).items():
        told = torch.tensor(record.baselines[name]).softmax(1)[:, 1]
        assert torch.allclose(told, illness_by_patient(logits, own_fold.test)[0], atol=1e-4)
    summary = read_json(tmp_path / "both" / "summary.json")
    assert summary["n_subjects"] == n and (tmp_path / "both" / "gains.png").is_file()
    table = combinations_table(read_part(FoldsSummary, tmp_path / "both" / "summary.json", ""))
    assert table.count("\n| ") == 9 + 1 and "\n| a, mean | " in table and "\n| stack of all | " in table
    stacked = record.models["stack of all, hardened"], record.models["a, mean, hardened"]
    points = [roc_auc_score(record.test.labels, [ill - well for well, ill in one.logits]) for one in stacked]
    assert f"{100 * (points[0] - points[1]):+.1f}" in table.split("\n| stack of all | ")[1].splitlines()[0]
    before = (tmp_path / "both" / "fold1.json").stat().st_mtime_ns
    assert combine_command(words) == 0 and (tmp_path / "both" / "fold1.json").stat().st_mtime_ns == before
    capsys.readouterr()
    for change, named in (
        (["--n-slices", "3"], "other n_slices (2, not 3)"),
        (["--state", "plain"], "other state (hardened, not plain)"),
        (["--question", "classes"], "other question (ill, not classes)"),
        (["--suite", "quick"], "other suite (smoke, not quick)"),
        (["--precision", "bf16"], "other precision (fp32, not bf16)"),
        (["--out", str(tmp_path / "a")], "no fold of a combination"),
    ):
        assert combine_command([*words, *change]) == 1
        assert named in capsys.readouterr().err
    assert (tmp_path / "both" / "fold1.json").stat().st_mtime_ns == before
    # two folds are asked for, and of one there are models: nothing is measured
    (tmp_path / "both" / "fold1.json").rename(tmp_path / "fold1.json")
    assert combine_command([*words, "--folds", "1", "2"]) == 1
    assert "no model in" in capsys.readouterr().err and not list((tmp_path / "both").glob("fold*.json"))
    content = read_json(tmp_path / "fold1.json")
    assert content["members"] == {n: file_digest(tmp_path / f"work/{n}/fold1/hardened/{WEIGHTS}") for n in "ab"}
    write_json(tmp_path / "both" / "fold1.json", content | {"members": {**content["members"], "b": "0" * 64}})
    assert combine_command(words) == 1
    assert "other weights of b (000" in (told := capsys.readouterr().err) and "trained again since" in told
    weights = tmp_path / "work" / "b" / "fold1" / "hardened" / WEIGHTS
    own = weights.read_bytes()
    weights.write_bytes((tmp_path / "work" / "b" / "fold1" / "plain" / WEIGHTS).read_bytes())
    write_json(tmp_path / "both" / "fold1.json", content)
    for out in ("both", "other"):
        assert combine_command([*words, "--out", str(tmp_path / out)]) == 1
        told = capsys.readouterr().err
        assert "the weights in" in told and "are not those that the record beside them names" in told
        assert "b/fold1.json is moved away" in told
    weights.unlink()
    assert combine_command(words) == 0  # of a finished fold the weights may be gone
    weights.write_bytes(own)
    assert combine_command([*words, "--members", "a", "a", "--out", str(tmp_path / "twice")]) == 1
    assert "a is named twice" in capsys.readouterr().err
    assert combine_command([*words, "--seed=-1", "--out", str(tmp_path / "twice")]) == 1
    assert "seed must be a whole number from 0" in capsys.readouterr().err
    of_classes = [*shared, "--members", "a", "--n-slices", "2", "--suite", "smoke", "--question", "classes"]
    assert combine_command([*of_classes, "--out", str(tmp_path / "classes")]) == 0
    assert read_fold(tmp_path / "classes" / "fold1.json").classes == list(CLASSES)
    assert combine_command([*shared, "--members", "c", "--out", str(tmp_path / "none")]) == 1
    assert "no model in" in capsys.readouterr().err
    assert combine_command([*shared, "--members", "a", "--out", str(tmp_path / "none"), "--seed", "5"]) == 1
    assert "Or give --n-folds, --seed and --validation-share as the run" in capsys.readouterr().err


def test_a_verdict_is_attacked_at_the_threshold_of_validation_patients() -> None:
    net = train_toy(seed=0, steps=40)
    validation, test = (patient_stacks(toy_images(128, seed=seed), 4) for seed in (3, 4))
    verdict = verdict_of(MeanOfSlices(net), validation)
    asked = ill_or_not(test)
    assert asked.classes == ["healthy", "ill"] and torch.equal(asked.labels, (test.labels != 0).long())
    chance = 1 - predict(MeanOfSlices(net), test).softmax(1)[:, 0]
    said = predict(verdict, asked).argmax(1).bool()
    assert torch.equal(said, chance > verdict.cut[1].exp())
    curve = robustness_curve(verdict, asked, attack=SUITES["smoke"], epsilons=[EPS])
    four = robustness_curve(MeanOfSlices(net), test, attack=SUITES["smoke"], epsilons=[EPS])
    # another class of the ill is another answer, and the same verdict
    assert curve.robust_accuracy[1] >= four.robust_accuracy[1] - 0.1
    with pytest.raises(ValueError, match="known to mean healthy"):
        ill_or_not(replace(test, classes=["a", "b", "c", "d"]))
