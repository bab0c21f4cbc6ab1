from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ended, forked, small_model
from safetensors.torch import load_file
from torch import nn

from models import def_models
from models.def_models import build_model
from utils.data.phantom import PhantomConfig, make_phantoms
from utils.data.preparation import group_by_subject, splits_in_memory
from utils.evaluation.metrics import Levels, Scores
from utils.evaluation.probe import fit_head
from utils.experiments.records import check_against_record, save_trained, update_record
from utils.experiments.search_space import SEARCH_SPACE
from utils.training.augment import NO_AUGMENTATION, Augmentation
from utils.training.checkpoints import load_checkpoint, load_resume_state, read_record, rounded_to_half, save_checkpoint
from utils.training.config import OPTIMIZERS, SCHEDULERS, TrainConfig
from utils.training.loop import train
from utils.training.objectives import Adversarial, Standard, Step
from utils.training.optimization import make_criterion, rate_factor
from utils.training.record import Record

FAST = TrainConfig(num_epochs=2, batch_size=32, learning_rate=3e-3)


pytestmark = pytest.mark.usefixtures("small_backbone")


def test_training_learns_and_keeps_the_best_epoch(splits) -> None:
    model = small_model()
    seen = []
    config = replace(FAST, num_epochs=20, batch_size=16, augmentation=NO_AUGMENTATION)
    result = train(model, splits, config=config, on_epoch=seen.append)
    scores = [entry["validation_balanced_accuracy"] for entry in result.history]
    assert result.history == seen and scores[result.best_epoch] == max(scores) > 0.4
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"] and not model.training


def test_same_seed_same_weights_and_other_seed_others(splits) -> None:
    models = [small_model(), small_model(), small_model()]
    for model, seed in zip(models, (1, 1, 2)):
        train(model, splits, config=replace(FAST, seed=seed))
    one, two, other = (model.state_dict() for model in models)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("objective", [Standard(), Adversarial(eps=4 / 255, steps=1)], ids=lambda o: o.name)
def test_every_optimizer_and_scheduler_runs_clean_and_adversarial(
    splits, optimizer: str, scheduler: str, objective: Standard
) -> None:
    model = small_model()
    before = model.backbone.out.weight.clone()
    config = replace(FAST, num_epochs=1, optimizer=optimizer, scheduler=scheduler, validation_images=16)
    entry = train(model, splits, objective=objective, config=config).history[0]
    assert not torch.equal(before, model.backbone.out.weight)
    assert ("validation_robust_accuracy" in entry) == (objective.name == "adversarial")


def test_the_default_search_knows_every_optimizer_and_scheduler() -> None:
    assert set(SEARCH_SPACE["optimizer"][1]) == set(OPTIMIZERS)
    assert set(SEARCH_SPACE["scheduler"][1]) == set(SCHEDULERS)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_starts_at_most_at_the_peak(scheduler: str) -> None:
    factors = [rate_factor(scheduler, progress / 50) for progress in range(50)]
    assert all(0 < factor <= 1 for factor in factors) and max(factors) == pytest.approx(1, abs=0.02)


def test_adversarial_training_makes_a_model_more_robust(splits) -> None:
    from utils.attacks.attack import Attack
    from utils.evaluation.worst_case import robustness_curve

    # all images: how robust the weights are is the question here, not to whom they generalise
    images = splits.train.join(splits.validation).join(splits.test)
    objective = Adversarial(eps=4 / 255, steps=2, adv_weight=1.0)
    gains = []
    # two seeds: on another processor other roundings end in other weights
    for seed in (0, 1):
        config = replace(FAST, num_epochs=20, batch_size=16, augmentation=NO_AUGMENTATION, fit_head=True, seed=seed)
        model, robust = small_model(seed), []
        for own in ({"config": config}, {"config": replace(config, fit_head=False), "objective": objective}):
            train(model, splits, **own)
            robust.append(robustness_curve(model, images, attack=Attack(steps=10), epsilons=[4 / 255]))
        assert robust[1].robust_accuracy[0] > 0.4
        gains.append(robust[1].robust_accuracy[1] - robust[0].robust_accuracy[1])
    assert sum(gains) / len(gains) > 0.05


def test_adv_weight_mixes_clean_and_attacked_loss(splits) -> None:
    model = small_model().eval()
    images, labels = splits.train.pixels(slice(0, 8)), splits.train.labels[:8]
    seen = {}
    for weight in (0.25, 1.0):
        draws = torch.Generator().manual_seed(0)
        objective = Adversarial(eps=4 / 255, steps=2, adv_weight=weight, ramp=0)
        step = Step(nn.functional.cross_entropy, 0.0, draws, model)
        attacked = objective.attack(images, labels, step)
        seen[weight] = objective.loss(model, images, attacked, labels, step)[0].item()
    clean = nn.functional.cross_entropy(model(images), labels).item()
    assert seen[0.25] == pytest.approx(0.75 * clean + 0.25 * seen[1.0], rel=1e-4) and seen[1.0] > clean


@pytest.mark.parametrize(
    "wrong",
    [
        {"eps": 8},
        {"eps": 0.1, "adv_weight": 0.0},
        {"eps": 0.1, "steps": 0},
        {"eps": 0.1, "ramp": 2},
        {"eps": 0.1, "alpha": -1},
    ],
)
def test_bad_objectives(wrong: dict) -> None:
    with pytest.raises(ValueError):
        Adversarial(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_epochs": 0},
        {"optimizer": "lion"},
        {"scheduler": "x"},
        {"class_balance": 2},
        {"learning_rate": float("nan")},
        {"num_epochs": 1.5},
        {"patience": -1},
        {"accumulation_steps": 0},
    ],
)
def test_bad_settings(wrong: dict) -> None:
    with pytest.raises(ValueError):
        TrainConfig(**wrong)


@pytest.mark.parametrize("changes", [{}, {"awp": 0.05}, {"mixup": 0.4}], ids=str)
def test_a_batch_in_parts_is_the_batch(splits, changes: dict) -> None:
    largest, weights, losses = [], [], []
    for parts in (1, 3):
        # the statistics of BatchNorm are those of a part, so here it has those that it began with
        model = small_model().freeze_batchnorm()
        seen = []
        model.register_forward_pre_hook(
            lambda module, inputs, seen=seen: seen.append((module.training, len(inputs[0])))
        )
        config = replace(FAST, batch_size=20, optimizer="sgd", accumulation_steps=parts, **changes)
        result = train(model, splits, objective=Adversarial(eps=4 / 255, steps=2), config=config)
        largest.append(max(n for trains, n in seen if trains))
        losses.append([entry["train_loss"] for entry in result.history])
        weights.append(model.state_dict())
    assert largest == [20, 7]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-2, atol=1e-4)


def test_no_part_of_a_batch_is_too_small_for_batchnorm(splits) -> None:
    result = train(small_model(), splits, config=replace(FAST, num_epochs=1, batch_size=9, accumulation_steps=50))
    assert len(result.history) == 1


def test_early_stopping(splits) -> None:
    config = replace(FAST, num_epochs=30, learning_rate=1e-9, patience=2)
    assert len(train(small_model(), splits, config=config).history) < 30


def test_only_trainable_parameters_change(splits) -> None:
    model = small_model().freeze("head")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, splits, config=FAST)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"backbone.out.weight", "backbone.out.bias"}
    with pytest.raises(ValueError, match="trainable"):
        train(model.requires_grad_(False), splits, config=FAST)


def test_training_starts_from_a_fitted_head_where_that_is_asked(splits) -> None:
    fitted, trained = fit_head(small_model(), splits.train), small_model()
    train(trained, splits, config=replace(FAST, fit_head=True, learning_rate=1e-12))
    weight = fitted.backbone.out.weight
    assert torch.allclose(trained.backbone.out.weight, weight, atol=float(weight.detach().abs().max()) / 500)
    assert (weight - small_model().backbone.out.weight).abs().max() > 0.01
    with pytest.raises(ValueError, match="fit_head"):
        TrainConfig(fit_head="yes")


def test_diverging_loss_is_reported(splits) -> None:
    model = small_model()
    model.backbone.out.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="learning_rate"):
        train(model, splits, config=FAST)


def test_class_weights_have_mean_one_over_the_images(splits) -> None:
    part = splits.train.subset(torch.arange(len(splits.train))[splits.train.labels != 3])
    logits = torch.zeros(len(part), 4)
    for balance in (0.0, 0.5, 1.0):
        criterion = make_criterion(part, replace(FAST, class_balance=balance), torch.device("cpu"))
        assert criterion(logits, part.labels).item() == pytest.approx(torch.tensor(4.0).log().item(), rel=1e-4)


def _start(folder: Path, out: Path) -> int:
    """A training in a process of its own, whose number is returned; it leaves ``out`` when it has ended."""

    def work() -> None:
        raw = make_phantoms(PhantomConfig(n_subjects=16, n_levels=2))
        splits = splits_in_memory(raw, group_by_subject(raw), "patient")
        torch.manual_seed(0)
        model = build_model("efficientnet_b0", image_size=32)
        config = TrainConfig(num_epochs=3, batch_size=4, validation_images=4, fit_head=True)
        objective = Adversarial(eps=4 / 255, steps=1)
        result = train(model, splits, objective=objective, config=config, folder=folder, save_every=0.0)
        torch.save({"weights": model.state_dict(), "history": json.dumps(result.history)}, out)

    return forked(work)


def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    assert ended(_start(tmp_path / "whole", tmp_path / "whole.pt")) == 0
    state = tmp_path / "killed" / "resume" / "state.pt"
    for moment in (0.0, 0.37, 0.9):
        before = state.stat().st_mtime_ns if state.exists() else 0
        process, deadline = _start(tmp_path / "killed", tmp_path / "killed.pt"), time.monotonic() + 120
        while time.monotonic() < deadline and (not state.exists() or state.stat().st_mtime_ns == before):
            time.sleep(0.01)
        time.sleep(moment)
        os.kill(process, signal.SIGKILL)
        assert ended(process) == -signal.SIGKILL
    assert not (tmp_path / "killed.pt").exists()
    assert ended(_start(tmp_path / "killed", tmp_path / "killed.pt")) == 0
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "killed.pt"))
    assert all(torch.equal(one["weights"][name], two["weights"][name]) for name in one["weights"])
    histories = [[{k: v for k, v in e.items() if k != "seconds"} for e in json.loads(x["history"])] for x in (one, two)]
    assert histories[0] == histories[1]


def test_a_state_of_other_settings_is_refused(splits, tmp_path: Path) -> None:
    train(small_model(), splits, config=FAST, folder=tmp_path)
    assert load_resume_state(tmp_path, {}) is not None
    with pytest.raises(ValueError, match="learning_rate.*delete it"):
        train(small_model(), splits, config=replace(FAST, learning_rate=1e-4), folder=tmp_path)
    (tmp_path / "resume" / "state.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match="not a readable training state"):
        train(small_model(), splits, config=FAST, folder=tmp_path)


def test_a_state_of_another_start_is_refused(splits, tmp_path: Path) -> None:
    train(small_model(), splits, config=FAST, folder=tmp_path)
    with pytest.raises(ValueError, match=r"\(start\)"):
        train(small_model(seed=1), splits, config=FAST, folder=tmp_path)
    with pytest.raises(ValueError, match=r"\(trainable\)"):
        train(small_model().freeze("head"), splits, config=FAST, folder=tmp_path)


def test_a_last_batch_of_one_does_not_break_batchnorm(splits) -> None:
    size = len(splits.train) - 1
    assert train(small_model(), splits, config=replace(FAST, num_epochs=1, batch_size=size)).history


def test_training_without_validation_images_is_refused(splits) -> None:
    empty = replace(splits, validation=splits.validation.subset(torch.arange(0)))
    with pytest.raises(ValueError, match="one validation image"):
        train(small_model(), empty, config=FAST)


def _trained(splits, folder: Path) -> tuple[def_models.MRIClassifier, dict]:
    model = small_model()
    result = train(model, splits, config=FAST, folder=folder)
    start = str(folder / "encoder.safetensors")
    return model, save_trained(model, folder, splits=splits, result=result, config=FAST, start=start)


def test_checkpoint_round_trip(splits, tmp_path: Path) -> None:
    model, record = _trained(splits, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["record.json", "weights.safetensors"]
    loaded, again = load_checkpoint(tmp_path, classes=splits.classes, fingerprint=splits.fingerprint)
    images = splits.test.pixels(slice(0, 4))
    assert torch.equal(loaded(images), model(images)) and again == record
    needed = {"history", "config", "objective", "best_epoch", "seconds", "start"}
    assert record.training.start == "encoder.safetensors"  # and not where it lay
    assert needed <= set(record.training.plain()) and record.data.fingerprint == splits.fingerprint
    assert {"versions", "hardware", "commit", "python"} <= set(record.environment.plain())
    update_record(tmp_path, extra=[1])
    assert read_record(tmp_path).extra == [1] and read_record(tmp_path).training == record.training


def test_trained_weights_take_half_the_space_and_nothing_is_lost(splits, tmp_path: Path) -> None:
    model = small_model().freeze("head")
    frozen = {name: value.clone() for name, value in model.backbone[0].state_dict().items()}
    train(model, splits, config=FAST)
    save_checkpoint(model, {"classes": splits.classes}, tmp_path)
    stored = load_file(tmp_path / "weights.safetensors")
    assert stored["backbone.out.weight"].dtype == torch.float16 and stored["backbone.0.0.weight"].dtype == torch.float32
    loaded = load_checkpoint(tmp_path)[0].state_dict()
    assert all(loaded[name].dtype == value.dtype for name, value in model.state_dict().items())
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(loaded[f"backbone.0.{name}"], value) for name, value in frozen.items())


def test_rounding_to_half_precision_keeps_what_it_cannot_hold() -> None:
    assert torch.equal(rounded_to_half(torch.tensor([1.0, 0.1])), torch.tensor([1.0, 0.0999755859375]))
    for kept in (torch.tensor([1e5, 0.1]), torch.tensor(70_000)):
        assert torch.equal(rounded_to_half(kept), kept)


def test_checkpoints_that_do_not_fit_are_refused(splits, tmp_path: Path) -> None:
    _trained(splits, tmp_path)
    with pytest.raises(ValueError, match="classes"):
        load_checkpoint(tmp_path, classes=["a", "b"])
    with pytest.raises(ValueError, match="not dino_v2; set BACKBONE"):
        load_checkpoint(tmp_path, backbone="dino_v2")
    with pytest.raises(ValueError, match="fingerprint"):
        load_checkpoint(tmp_path, fingerprint="0" * 16)
    record = read_record(tmp_path)
    update_record(tmp_path, model=record.model.plain() | {"image_size": 64})
    with pytest.raises(ValueError, match="record.json describes"):
        load_checkpoint(tmp_path)
    update_record(tmp_path, model=record.model)
    (tmp_path / "weights.safetensors").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        load_checkpoint(tmp_path)
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(ValueError, match="does not describe a model"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="load_existing_params"):
        load_checkpoint(tmp_path / "nothing")


def test_a_model_that_differs_from_its_record_is_noticed() -> None:
    found, other = (
        Levels(image=Scores(n=10, accuracy=share, balanced_accuracy=share, macro_f1=share, auroc=None), patient=None)
        for share in (0.5, 0.9)
    )
    with pytest.raises(ValueError, match=r"50.00%.*90.00%"):
        check_against_record(found, Record(test=other))
    check_against_record(found, Record())


def test_augmentation_keeps_range_shape_and_seed() -> None:
    images = torch.rand(16, 1, 40, 40)
    augment = Augmentation(strength=2.0)
    one, two = (augment(images, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, two) and one.shape == images.shape and one.min() >= 0 and one.max() <= 1
    assert (one != images).any()
    assert torch.allclose(NO_AUGMENTATION(images, torch.Generator()), images, atol=1e-5)
    flipped = replace(NO_AUGMENTATION, flip=1.0)(images, torch.Generator())
    assert torch.allclose(flipped, images.flip(-1), atol=1e-5)
    with pytest.raises(ValueError, match="probabilities"):
        Augmentation(flip=1.5)


def test_augmentation_leaves_the_background_black() -> None:
    images = torch.zeros(8, 1, 40, 40)
    images[:, :, 12:28, 12:28] = 0.7
    changed = Augmentation(affine=0.0, flip=0.0, intensity=1.0, strength=2.0)(images, torch.Generator().manual_seed(0))
    assert (changed[:, :, :10] == 0).all() and (changed[:, :, 15, 15] != 0.7).any()


def test_bf16_computes_in_bf16_and_leaves_a_float32_model(splits) -> None:
    model = small_model()
    seen = []
    layer = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    config = TrainConfig(num_epochs=1, precision="bf16")
    train(model, splits, objective=Adversarial(eps=2 / 255, steps=1), config=config)
    assert torch.bfloat16 in seen
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.float32}
    seen.clear()
    assert model(torch.rand(2, 1, 32, 32)).dtype == torch.float32
    assert seen == [torch.float32]


def test_bf16_does_not_hide_the_weight_perturbation(splits) -> None:
    weights = {}
    for awp in (0.0, 0.5):
        config = TrainConfig(num_epochs=1, precision="bf16", awp=awp, fit_head=True)
        model = small_model()
        result = train(model, splits, objective=Adversarial(eps=2 / 255, steps=1, ramp=0), config=config)
        weights[awp] = result.history[0]["train_loss"]
    assert weights[0.5] > 1.05 * weights[0.0]
