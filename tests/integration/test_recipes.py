"""Hardening recipes against values worked out by hand, and what surrounds them in the training loop."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import add_backbone, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models import def_models
from models.def_models import build_model
from tests.toy import toy_images
from utils.data.sets import DataSplits
from utils.evaluation.baselines import BASELINES, fluid_shares
from utils.evaluation.metrics import best_threshold, illness_by_patient
from utils.training.augment import NO_AUGMENTATION, Augmentation
from utils.training.checkpoints import load_resume_state
from utils.training.config import SAMPLINGS, TrainConfig
from utils.training.loop import train
from utils.training.objectives import (
    RECIPES,
    Adversarial,
    Hardening,
    Mart,
    NFgsm,
    Step,
    Trades,
    divergence,
    make_objective,
)
from utils.training.optimization import make_average, make_optimizer, perturbed_weights
from utils.training.sampling import epoch_order, mix

pytestmark = pytest.mark.usefixtures("small_backbone")
EPS = 4 / 255
FAST = TrainConfig(num_epochs=2, batch_size=32, learning_rate=3e-3, validation_images=16)


class Linear(nn.Module):
    """Logits W x of the flattened image: everything about it is known in closed form."""

    def __init__(self, n_classes: int = 2, side: int = 4) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(n_classes, side * side, generator=draws))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.weight.T


@pytest.fixture
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(5)
    return 0.3 + 0.4 * torch.rand(6, 1, 4, 4, generator=draws), torch.tensor([0, 1, 1, 0, 1, 0])


def _step(model: nn.Module, progress: float = 1.0) -> Step:
    return Step(nn.functional.cross_entropy, progress, torch.Generator().manual_seed(0), model)


def _by_hand(model: nn.Module, clean: torch.Tensor, attacked: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    weight = model.weight.detach().numpy().astype(float)
    rows = []
    for images in (clean, attacked):
        logits = images.flatten(1).numpy().astype(float) @ weight.T
        powers = np.exp(logits - logits.max(1, keepdims=True))
        rows.append(powers / powers.sum(1, keepdims=True))
    return rows[0], rows[1]


def test_trades_is_cross_entropy_and_divergence(pictures) -> None:
    images, labels = pictures
    model, objective = Linear(3), Trades(eps=0.1, steps=3, beta=2.5)
    attacked = objective.attack(images, labels, _step(model))
    loss, logits = objective.loss(model, images, attacked, labels, _step(model))
    p, q = _by_hand(model, images, attacked)
    own = np.arange(6), labels.numpy()
    expected = -np.log(p[own]).mean() + 2.5 * (p * np.log(p / q)).sum(1).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert torch.allclose(logits, model(attacked))


def test_the_trades_attack_climbs_the_divergence(pictures) -> None:
    """On two classes the divergence grows with the change of the one logit difference: the ball's corners win."""
    images, labels = pictures
    model = Linear(2)
    attacked = Trades(eps=0.1, steps=10).attack(images, labels, _step(model))
    direction = (model.weight[0] - model.weight[1]).detach().sign().view(1, 1, 4, 4)
    corners = torch.stack([images + 0.1 * direction, images - 0.1 * direction])
    with torch.no_grad():
        highest = torch.stack([divergence(model(images), model(corner)) for corner in corners])
        reached = divergence(model(images), model(attacked))
    assert (reached >= highest.amin(0) - 1e-5).all() and (reached - images.new_zeros(6) > 0).all()
    assert torch.isclose(reached, highest, rtol=1e-3).any(0).all()


def test_mart_is_what_the_paper_says(pictures) -> None:
    images, labels = pictures
    model, objective = Linear(3), Mart(eps=0.1, steps=2, beta=4.0)
    attacked = objective.attack(images, labels, _step(model))
    loss = objective.loss(model, images, attacked, labels, _step(model))[0].item()
    p, q = _by_hand(model, images, attacked)
    own = np.arange(6), labels.numpy()
    wrong = q.copy()
    wrong[own] = 0
    boosted = -np.log(q[own]) - np.log(1 - wrong.max(1))
    expected = boosted.mean() + 4 * ((p * np.log(p / q)).sum(1) * (1 - p[own])).mean()
    assert loss == pytest.approx(expected, rel=1e-4)


def test_n_fgsm_is_one_step_from_strong_noise_without_projection(pictures) -> None:
    images, labels = pictures
    model, objective = Linear(2), NFgsm(eps=0.05, noise=2.0)
    attacked = objective.attack(images, labels, _step(model))
    noise = 2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) - 1
    away = (model.weight[1] - model.weight[0]).detach().sign().view(1, 1, 4, 4)
    toward = torch.where(labels == 0, 1.0, -1.0).view(-1, 1, 1, 1)
    expected = images + 2 * 0.05 * noise + 0.05 * toward * away
    assert torch.allclose(attacked, expected.clamp(0, 1), atol=1e-6)
    assert 0.05 < (attacked - images).abs().max() <= 0.15 + 1e-6
    loss = objective.loss(model, images, attacked, labels, _step(model))[0]
    assert loss.item() == pytest.approx(F.cross_entropy(model(attacked), labels).item())


def test_pgd_on_a_linear_model_reaches_the_closed_form(pictures) -> None:
    images, labels = pictures
    model = Linear(2)
    attacked = Adversarial(eps=0.1, steps=5).attack(images, labels, _step(model))
    away = (model.weight[1] - model.weight[0]).detach().sign().view(1, 1, 4, 4)
    toward = torch.where(labels == 0, 1.0, -1.0).view(-1, 1, 1, 1)
    assert torch.allclose(attacked, images + 0.1 * toward * away, atol=1e-6)


@given(st.floats(0, 1), st.integers(1, 9), st.floats(0, 1), st.floats(0, 1))
def test_strength_grows_and_always_reaches_the_edge(
    progress: float, steps: int, ramp: float, curriculum: float
) -> None:
    objective = Adversarial(eps=EPS, steps=steps, ramp=ramp, curriculum=curriculum)
    now, later = objective.strength(progress), objective.strength(min(1, progress + 0.1))
    assert 1 <= now["steps"] <= later["steps"] <= steps and now["eps"] <= later["eps"] <= EPS
    assert now["alpha"] * now["steps"] == pytest.approx(2.5 * now["eps"])
    assert objective.strength(1.0) == {"eps": EPS, "alpha": 2.5 * EPS / steps, "steps": steps}


def test_recipes_are_made_by_name() -> None:
    values = {"eps": EPS, "alpha": None, "steps": 4, "adv_weight": 0.7, "beta": None}
    assert make_objective("adversarial", **values) == Adversarial(eps=EPS, steps=4, adv_weight=0.7)
    assert make_objective("trades", **values | {"beta": 3.0}) == Trades(eps=EPS, steps=4, beta=3.0)
    assert make_objective("n_fgsm", **values) == NFgsm(eps=EPS)
    with pytest.raises(ValueError, match="recipe must be one of adversarial, trades, mart, n_fgsm"):
        make_objective("free", **values)


@pytest.mark.parametrize(
    ("kind", "wrong"), [(Trades, {"beta": 0}), (Mart, {"beta": -1}), (NFgsm, {"noise": -1}), (NFgsm, {"steps": 2})]
)
def test_bad_recipes(kind: type[Hardening], wrong: dict) -> None:
    with pytest.raises(ValueError):
        kind(eps=EPS, **wrong)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_with_every_option(splits, recipe: str) -> None:
    config = replace(
        FAST, ema_decay=0.9, awp=0.01, label_smoothing=0.1, mixup=0.4, cutmix=1.0, layer_decay=0.5, sampling="patient"
    )
    config = replace(config, augmentation=Augmentation(scanner=0.5))
    objective = make_objective(recipe, eps=EPS, steps=2, curriculum=0.5)
    model = small_model().freeze_batchnorm()
    frozen = {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "num_batches" in k}
    before = model.backbone.out.weight.detach().clone()
    history = train(model, splits, objective=objective, config=config).history
    assert all(math.isfinite(entry["train_loss"]) for entry in history)
    assert not torch.equal(before, model.backbone.out.weight)
    assert frozen and all(torch.equal(value, model.state_dict()[name]) for name, value in frozen.items())


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_makes_a_model_more_robust(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from utils.attacks.attack import Attack
    from utils.evaluation.worst_case import robustness_curve

    # so small a net, in so few steps, learns the toy task from a start that is already decided
    monkeypatch.setattr(def_models, "_undecided", lambda *_: None)
    splits = DataSplits(toy_images(256, seed=1), toy_images(64, seed=3), toy_images(160, seed=4))
    config = replace(FAST, num_epochs=12, batch_size=64, augmentation=NO_AUGMENTATION)
    plain, hardened = small_model(), small_model()
    train(plain, splits, config=config)
    train(hardened, splits, objective=make_objective(recipe, eps=6 / 255, steps=3, adv_weight=1.0), config=config)
    stood = [
        robustness_curve(model, splits.test, attack=Attack(), epsilons=[6 / 255]).robust_accuracy[1]
        for model in (plain, hardened)
    ]
    assert stood[1] > stood[0] + 0.1


def test_perturbed_weights_are_given_back_and_were_as_far_away_as_asked(splits) -> None:
    model = small_model().eval()  # without dropout one loss can be held against another
    images, labels = splits.train.pixels(slice(0, 16)), splits.train.labels[:16]
    before = {name: value.detach().clone() for name, value in model.named_parameters()}

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(images), labels)

    at_rest = loss().item()
    with pytest.raises(RuntimeError, match="inside"), perturbed_weights(model, [loss()], 0.02):
        for name, value in model.named_parameters():
            moved = (value - before[name]).norm().item()
            assert moved == pytest.approx(0.02 * before[name].norm().item() if value.ndim > 1 else 0, abs=1e-6)
        assert loss().item() > at_rest
        raise RuntimeError("inside")
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert all(value.grad is None for value in model.parameters())


def test_the_average_follows_its_recursion() -> None:
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(1.0)
    average, expected = make_average(net, 0.5), 1.0
    for step, value in enumerate((1.0, 3.0, -2.0, 5.0)):
        net.weight.data.fill_(value)
        average.update_parameters(net)
        decay = min(0.5, (1 + step) / (10 + step)) if step else 0.0
        expected = decay * expected + (1 - decay) * value
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-5)


def test_averaged_weights_are_what_is_kept(splits) -> None:
    models = [small_model(), small_model()]
    for model, decay in zip(models, (0.0, 0.95)):
        train(model, splits, config=replace(FAST, num_epochs=1, ema_decay=decay))
    raw, averaged = (model.backbone.out.weight for model in models)
    start = small_model().backbone.out.weight
    assert not torch.equal(raw, averaged) and (averaged - start).norm() < (raw - start).norm()


def test_layer_wise_rates_fall_from_the_head() -> None:
    model = build_model("resnet34", image_size=32)
    optimizer = make_optimizer(model, replace(FAST, layer_decay=0.5))
    scale = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    backbone = model.backbone
    assert scale[id(backbone.fc.weight)] == 1 and scale[id(backbone.conv1.weight)] == 0.5**5
    assert scale[id(backbone.layer4[0].conv1.weight)] == 0.5 and scale[id(backbone.layer1[0].bn1.bias)] == 0.5**4
    assert len(scale) == len(list(model.parameters()))
    assert {group["scale"] for group in make_optimizer(model, FAST).param_groups} == {1.0}


def test_a_frozen_batchnorm_stays_frozen_through_train_and_attack(splits) -> None:
    model = build_model("resnet34", image_size=32).freeze_batchnorm().train()
    norm = model.backbone.bn1
    assert not norm.training and not norm.weight.requires_grad and model.backbone.conv1.training
    Adversarial(eps=EPS, steps=1).attack(splits.train.pixels(slice(0, 2)), splits.train.labels[:2], _step(model))
    assert not norm.training and model.backbone.conv1.training and model.training


def test_patients_are_spread_over_batches(splits) -> None:
    data = splits.train
    n_patients = len(data.subjects.unique())
    order = epoch_order(data, "patient", torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(len(data)))
    for start in range(0, len(data), n_patients):
        most = max(Counter(data.subjects[order[start : start + n_patients]].tolist()).values())
        assert most <= 2
    # each fourth part of the epoch holds each patient once
    part = data.subjects[order[: len(data) // 4]]
    assert len(part.unique()) >= 0.9 * n_patients


def test_classes_are_drawn_equally_often(splits) -> None:
    own = splits.train.labels
    data = splits.train.subset(torch.nonzero((own == 0) | (torch.arange(len(own)) % 3 == 0))[:, 0])
    draws = torch.Generator().manual_seed(0)
    labels = torch.cat([data.labels[epoch_order(data, "class", draws)] for _ in range(60)])
    shares = labels.bincount(minlength=4).double() / len(labels)
    assert torch.allclose(shares, torch.full((4,), 0.25, dtype=torch.double), atol=0.03)
    assert not torch.allclose(data.labels.bincount(minlength=4) / len(data), torch.full((4,), 0.25), atol=0.03)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_an_epoch_has_as_many_images_as_the_set_and_depends_on_the_seed(splits, sampling: str) -> None:
    one, two, other = (epoch_order(splits.train, sampling, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert len(one) == len(splits.train) and torch.equal(one, two) and not torch.equal(one, other)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)]))
def test_mixed_labels_tell_what_the_pixels_hold(seed: int, sizes: tuple[float, float]) -> None:
    labels = torch.arange(6) % 3
    # each image is filled with its own label: the mean pixel is the expected label
    images = labels.float().view(-1, 1, 1, 1).expand(-1, 1, 12, 12) / 2
    draws = torch.Generator().manual_seed(seed)
    mixed, main, shares = mix(images, labels, 3, mixup=sizes[0], cutmix=sizes[1], generator=draws)
    assert torch.allclose(shares.sum(1), torch.ones(6)) and torch.equal(main, labels)
    assert (shares.gather(1, labels[:, None]) >= 0.45).all() and mixed.shape == images.shape
    expected = (shares * torch.arange(3) / 2).sum(1)
    assert torch.allclose(mixed.mean((1, 2, 3)), expected, atol=1e-5)


def test_scanner_changes_leave_the_background_and_other_draws_alone() -> None:
    images = torch.zeros(8, 1, 40, 40)
    images[:, :, 10:30, 10:30] = 0.5 + 0.3 * torch.rand(8, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    only = replace(NO_AUGMENTATION, strength=1.0, scanner=1.0)
    changed = only(images, torch.Generator().manual_seed(1))
    assert (changed[:, :, :10] == 0).all() and (changed != images).any(3).any(2).any(1).all()
    assert changed.min() >= 0 and changed.max() <= 1
    assert torch.equal(changed, only(images, torch.Generator().manual_seed(1)))
    never = replace(Augmentation(), scanner=1e-9)(images, torch.Generator().manual_seed(1))
    assert torch.allclose(never, Augmentation()(images, torch.Generator().manual_seed(1)), atol=1e-6)


def test_rician_noise_has_the_size_that_was_asked_for() -> None:
    images = torch.full((16, 1, 64, 64), 0.6)
    quiet = {"gain": 0.0, "bias_field": 0.0, "motion": 0.0}
    noisy = replace(NO_AUGMENTATION, strength=1.0, scanner=1.0, noise=0.05, **quiet)(images, torch.Generator())
    # far above the noise a Rician is a Gaussian of this width about sqrt(A^2 + s^2)
    assert noisy.std().item() == pytest.approx(0.05, rel=0.05)
    assert noisy.mean().item() == pytest.approx(math.hypot(0.6, 0.05), abs=0.002)


def test_baselines_answer_for_every_image_and_all_but_the_majority_look_at_it(splits) -> None:
    for name, baseline in BASELINES.items():
        logits = baseline(splits.train, splits.test)
        assert logits.shape == (len(splits.test), 4) and logits.isfinite().all()
        assert (len(logits.unique(dim=0)) == 1) == (name == "always the majority")
    own = BASELINES["1-NN, raw pixels"](splits.train, splits.train).argmax(1)
    assert torch.equal(own, splits.train.labels)


def test_fluid_of_each_slice_gives_a_patient_one_answer_and_needs_their_order(splits) -> None:
    read = BASELINES["fluid of each slice"]
    logits = read(splits.train, splits.test)
    for patient in splits.test.subjects.unique():
        assert len(logits[splits.test.subjects == patient].unique(dim=0)) == 1
    # phantoms are drawn with more fluid the more demented they are
    chances, ill = illness_by_patient(read(splits.train, splits.train), splits.train)
    assert chances[ill].mean() > chances[~ill].mean() + 0.2
    unordered = replace(splits.test, slices=torch.full_like(splits.test.slices, -1))
    assert torch.equal(read(splits.train, unordered), BASELINES["always the majority"](splits.train, unordered))


def test_a_threshold_parts_ill_from_healthy_and_is_the_middle_of_the_best() -> None:
    chances, ill = torch.tensor([0.1, 0.2, 0.3, 0.6, 0.7, 0.8]), torch.tensor([0, 0, 0, 1, 1, 1]).bool()
    assert best_threshold(chances, ill) == pytest.approx(0.45)
    assert best_threshold(chances, ~ill) in (pytest.approx(0.1), pytest.approx(0.75))  # no better than a coin
    noisy = torch.tensor([0, 0, 1, 0, 1, 1]).bool()
    cut = best_threshold(chances, noisy)
    said = chances >= cut
    assert (said[noisy].float().mean() + (~said)[~noisy].float().mean()) / 2 == pytest.approx(5 / 6)
    for one_kind in (ill | True, ill & False):
        with pytest.raises(ValueError, match="ill and healthy"):
            best_threshold(chances, one_kind)


def test_fluid_is_measured_where_it_was_drawn() -> None:
    image = np.zeros((60, 60), dtype=np.uint8)
    image[5:55, 5:55] = 200
    bare = fluid_shares(image[None])[0]
    image[25:35, 25:35] = 40
    inner = fluid_shares(image[None])[0]
    image[6:8, 5:55] = 40
    both = fluid_shares(image[None])[0]
    assert bare.tolist() == [0, 0] and inner.tolist() == [100 / 2500, 0]
    assert both[0] == inner[0] and both[1] > 0.05
    assert fluid_shares(np.zeros((1, 8, 8), dtype=np.uint8)).tolist() == [[0, 0]]


def _interrupted(splits, folder: Path, stop: int | None, **config) -> tuple[dict, list]:
    def on_epoch(entry: dict) -> None:
        if entry["epoch"] == stop:
            raise KeyboardInterrupt

    model = small_model()
    settings = {"config": replace(FAST, num_epochs=4, **config), "objective": Trades(eps=EPS, steps=1)}
    try:
        history = train(model, splits, folder=folder, on_epoch=on_epoch, **settings).history
    except KeyboardInterrupt:
        return _interrupted(splits, folder, None, **config)
    return model.state_dict(), [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


def test_an_interrupted_run_with_every_option_ends_as_an_uninterrupted_one(splits, tmp_path: Path) -> None:
    options = {"ema_decay": 0.9, "awp": 0.01, "mixup": 0.4, "sampling": "class", "layer_decay": 0.7}
    one, first = _interrupted(splits, tmp_path / "a", None, **options)
    two, second = _interrupted(splits, tmp_path / "b", 1, **options)
    assert first == second and all(torch.equal(one[name], two[name]) for name in one)


class _Enough(Exception):
    """Ends a training from its callback."""


def _wide(num_classes: int, image_size: int) -> nn.Module:
    """Enough weights to learn what the single step looks like."""
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()]
    for before, after in ((16, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
    net = nn.Sequential(nn.Sequential(*layers), nn.Flatten())
    net.add_module("out", nn.Linear(64 * 16, num_classes))
    return net


def test_a_run_made_to_collapse_is_noticed_and_goes_on_with_more_steps(tmp_path: Path, monkeypatch) -> None:
    """FGSM without noise and without decay of the rate, until the model is robust to FGSM alone."""
    add_backbone(monkeypatch, "wide", _wide)
    # from a start near zero this net learns more slowly, and does not collapse within these epochs
    monkeypatch.setattr(def_models, "_undecided", lambda *_: None)
    splits = DataSplits(toy_images(768, seed=1), toy_images(96, seed=3), toy_images(96, seed=4))
    config = TrainConfig(num_epochs=80, seed=1, learning_rate=0.01, scheduler="constant", weight_decay=0.0)
    config = replace(config, augmentation=NO_AUGMENTATION, validation_images=96)
    torch.manual_seed(0)
    model = build_model("wide", image_size=32)
    history, weights = [], []

    def watch(entry: dict) -> None:
        history.append(entry)
        weights.append(model.backbone.out.weight.detach().clone())
        if len(history) > 10 and history[-11].get("collapsed"):
            raise _Enough

    objective = NFgsm(eps=10 / 255, noise=0.0, ramp=0.05)
    with pytest.warns(UserWarning, match=r"catastrophic overfitting.*Adversarial\(.*steps=3"), pytest.raises(_Enough):
        train(model, splits, objective=objective, config=config, folder=tmp_path, on_epoch=watch)
    first = next(number for number, entry in enumerate(history) if entry.get("collapsed"))
    robust = [entry["validation_robust_accuracy"] for entry in history]
    best = int(np.argmax(robust[:first]))
    assert history[first]["validation_fgsm_accuracy"] - robust[first] > 0.15 and robust[best] - robust[first] > 0.15
    assert torch.equal(weights[first], weights[best])
    assert max(robust[first + 1 :]) > robust[first] + 0.1
    assert load_resume_state(tmp_path, {})["progress"]["collapsed_at"] == first
