from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.toy import Chances, Sigmoids, toy_images
from utils.attacks import library as library_attacks
from utils.attacks.apgd import apgd, apgd_targeted
from utils.attacks.attack import Attack
from utils.attacks.gradient import cross_entropy, default_alpha, fgsm, margin, pgd
from utils.attacks.library import auto_attack, library_attack, square
from utils.attacks.linked import linked_pgd
from utils.attacks.reweighed import Members, reweighed_pgd
from utils.attacks.targets import targeted_pgd
from utils.attacks.views import eot_pgd
from utils.core.modes import attack_mode
from utils.evaluation.examples import adversarial_examples
from utils.evaluation.worst_case import robustness_curve

EPS = 8 / 255


@pytest.mark.parametrize("eps", [1 / 255, 8 / 255, 0.3])
def test_fgsm_equals_torchattacks(small_net, batch, eps: float) -> None:
    theirs = torchattacks.FGSM(small_net, eps=eps)(*batch)
    small_net.eval()
    assert (fgsm(small_net, *batch, eps=eps) - theirs).abs().max() < 1e-6


@pytest.mark.parametrize("eps, alpha, steps", [(2 / 255, 0.5 / 255, 20), (8 / 255, 2 / 255, 10), (0.1, 0.03, 7)])
def test_pgd_without_random_start_equals_torchattacks(small_net, batch, eps, alpha, steps) -> None:
    theirs = torchattacks.PGD(small_net, eps=eps, alpha=alpha, steps=steps, random_start=False)(*batch)
    small_net.eval()
    ours = pgd(small_net, *batch, eps=eps, alpha=alpha, steps=steps, random_start=False)
    assert (ours - theirs).abs().max() < 1e-6


def test_parity_on_the_real_architecture(resnet) -> None:
    images, labels = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    theirs = torchattacks.PGD(resnet, eps=EPS, alpha=2 / 255, steps=5, random_start=False)(images, labels)
    resnet.eval()
    ours = pgd(resnet, images, labels, eps=EPS, alpha=2 / 255, steps=5, random_start=False)
    assert (ours - theirs).abs().max() < 1e-6


@settings(max_examples=40, deadline=None)
@given(
    eps=st.floats(0, 1),
    steps=st.integers(1, 4),
    restarts=st.integers(1, 3),
    loss=st.sampled_from(["ce", "margin"]),
    random_start=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_attacks_stay_in_the_ball_and_in_the_image(eps, steps, restarts, loss, random_start, seed) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    images, labels = torch.rand(5, 1, 6, 6), torch.randint(4, (5,))
    options = {"steps": steps, "restarts": restarts, "loss": loss, "random_start": random_start}
    for attacked in (pgd(model, images, labels, eps=eps, **options), fgsm(model, images, labels, eps=eps, loss=loss)):
        assert attacked.shape == images.shape and attacked.min() >= 0 and attacked.max() <= 1
        assert (attacked - images).abs().max() <= eps + 1e-6 and not attacked.requires_grad


def test_pgd_raises_the_loss_more_than_fgsm(small_net, batch) -> None:
    def value(images: torch.Tensor) -> float:
        return cross_entropy(small_net(images), batch[1]).sum().item()

    attacked = pgd(small_net, *batch, eps=EPS, steps=20, generator=torch.Generator().manual_seed(0))
    assert value(attacked) >= value(fgsm(small_net, *batch, eps=EPS)) > value(batch[0])


def test_restarts_are_never_weaker_than_one_start(small_net, batch) -> None:
    def wrong(restarts: int) -> torch.Tensor:
        draws = torch.Generator().manual_seed(3)
        attacked = pgd(small_net, *batch, eps=2 / 255, steps=3, restarts=restarts, generator=draws, loss="margin")
        return small_net(attacked).argmax(1) != batch[1]

    assert (wrong(5) | ~wrong(1)).all()


def test_generator_makes_random_starts_reproducible(small_net, batch) -> None:
    one, two, other = (
        pgd(small_net, *batch, eps=EPS, steps=1, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_margin_loss() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 5.0, 2.0]])
    assert margin(logits, torch.tensor([0, 2])).tolist() == [-2.0, 3.0]


class _Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.linear = nn.Dropout(), nn.Linear(36, 4)
        self.linear.bias.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise KeyError("inside the model")


def test_modes_and_flags_come_back_even_after_an_exception() -> None:
    model = _Fails().train()
    model.drop.eval()
    with pytest.raises(KeyError):
        pgd(model, torch.rand(2, 1, 6, 6), torch.zeros(2, dtype=torch.long), eps=EPS)
    assert model.training and not model.drop.training and model.linear.training
    assert model.linear.weight.requires_grad and not model.linear.bias.requires_grad


def test_attack_leaves_the_model_as_it_was(small_net, batch) -> None:
    small_net.train()
    small_net.body[1].eval()
    state = {name: value.clone() for name, value in small_net.state_dict().items()}
    modes = [module.training for module in small_net.modules()]
    pgd(small_net, *batch, eps=EPS)
    assert modes == [module.training for module in small_net.modules()]
    assert all(torch.equal(value, state[name]) for name, value in small_net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in small_net.parameters())
    with attack_mode(small_net):
        assert not any(p.requires_grad for p in small_net.parameters())


def test_attack_works_where_gradients_are_switched_off(small_net, batch) -> None:
    with torch.no_grad():
        assert (fgsm(small_net, *batch, eps=EPS) != batch[0]).any()


def test_too_small_a_step_size_warns(small_net, batch) -> None:
    with pytest.warns(UserWarning, match="cannot reach"):
        pgd(small_net, *batch, eps=EPS, alpha=EPS / 100, steps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pgd(small_net, *batch, eps=EPS, steps=10)
    assert default_alpha(0.02, 10) == pytest.approx(0.005)


@pytest.mark.parametrize("eps", [8, -0.1, float("nan")])
def test_bad_radius(small_net, batch, eps: float) -> None:
    for attack in (fgsm, pgd):
        with pytest.raises(ValueError, match="k/255"):
            attack(small_net, *batch, eps=eps)


def test_bad_images_and_budgets(small_net, batch) -> None:
    images, labels = batch
    for wrong in (images * 255, images - 0.5, torch.full_like(images, torch.nan)):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            pgd(small_net, wrong, labels, eps=EPS)
    with pytest.raises(TypeError, match="float32"):
        pgd(small_net, (images * 255).byte(), labels, eps=EPS)
    with pytest.raises(ValueError, match="expected N x C"):
        pgd(small_net, images, labels[:3], eps=EPS)
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
        pgd(small_net, images, labels, eps=EPS, steps=0)
    with pytest.raises(ValueError, match="alpha must be in"):
        pgd(small_net, images, labels, eps=EPS, alpha=-1.0)


@pytest.mark.parametrize("attack", [Attack("fgsm"), Attack("pgd", steps=4), Attack("pgd", steps=3, restarts=2)])
def test_curve_starts_at_clean_accuracy_and_never_rises(small_net, splits, attack: Attack) -> None:
    curve = robustness_curve(small_net, splits.test, attack=attack, epsilons=[4 / 255, 0.05, 1 / 255])
    clean = (small_net(splits.test.pixels(slice(None))).argmax(1) == splits.test.labels).double().mean().item()
    assert curve.epsilons == [0.0, 1 / 255, 4 / 255, 0.05] and curve.robust_accuracy[0] == clean
    assert curve.robust_accuracy == sorted(curve.robust_accuracy, reverse=True)
    assert all(norm <= eps + 1e-6 for norm, eps in zip(curve.max_norm, curve.epsilons))
    assert curve.n_images == len(splits.test) == len(curve.first_broken)
    again = robustness_curve(small_net, splits.test, attack=attack, epsilons=[4 / 255, 0.05, 1 / 255])
    assert again.first_broken == curve.first_broken


def test_radius_zero_alone_is_clean_accuracy(small_net, splits) -> None:
    curve = robustness_curve(small_net.train(), splits.test, attack=Attack(), epsilons=[0])
    small_net.eval()
    right = small_net(splits.test.pixels(slice(None))).argmax(1) == splits.test.labels
    assert curve.robust_accuracy == [right.double().mean().item()]
    assert [step == -1 for step in curve.first_broken] == right.tolist()


def test_attacks_in_inference_mode_and_on_images_that_want_gradients(small_net, batch) -> None:
    images, labels = batch
    with torch.inference_mode():
        assert (pgd(small_net, images, labels, eps=EPS, steps=2) != images).any()
    attacked = pgd(small_net, images.clone().requires_grad_(True), labels, eps=EPS, steps=2, restarts=2)
    assert not attacked.requires_grad


def test_models_that_would_pass_for_robust_are_refused(small_net, batch) -> None:
    with pytest.raises(TypeError, match="half precision"):
        pgd(small_net.half(), *batch, eps=EPS)
    small_net.float().head.weight.data.fill_(torch.nan)
    for attack in (fgsm, pgd):
        with pytest.raises(ValueError, match="gradient is NaN"):
            attack(small_net, *batch, eps=EPS)


def test_nan_logits_are_refused(small_net, splits) -> None:
    small_net.head.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        robustness_curve(small_net, splits.test, attack=Attack(), epsilons=[EPS])


def test_examples_are_the_same_images_at_each_radius(small_net, splits) -> None:
    attacks = [(Attack("fgsm"), eps) for eps in (0, EPS)]
    rows = adversarial_examples(small_net, splits.test, attacks=attacks, n=4)
    assert [[e.label for e in row] for row in rows] == [[e.label for e in rows[0]]] * 2
    assert all(e.clean == e.attacked for e in rows[0])
    for before, after in zip(*rows):
        assert (before.image - after.image).abs().max() <= EPS + 1e-6


def _stacked(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, **options: float) -> torch.Tensor:
    """Each image twice, as a patient of two slices whose answer is that to the first."""

    class First(nn.Module):
        def forward(self, stacks: torch.Tensor) -> torch.Tensor:
            return model(stacks[:, :1])

    return linked_pgd(First(), images.repeat(1, 2, 1, 1), labels, link="smooth", steps=2, **options)[:, :1]


def _vote(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, **options: float) -> torch.Tensor:
    return reweighed_pgd(Members(nn.ModuleList([model, model])), images, labels, steps=2, **options)


PUBLIC = {
    "fgsm": fgsm,
    "pgd": pgd,
    "apgd": apgd,
    "apgd_targeted": apgd_targeted,
    "square": partial(square, queries=5),
    "auto_attack": partial(auto_attack, steps=2, queries=5),
    "pgd_t": partial(targeted_pgd, target="likeliest", steps=2),
    "eot": partial(eot_pgd, steps=2, samples=1),
    "linked": _stacked,
    "reweighed": _vote,
    "BIM": partial(library_attack, "BIM", steps=2),
    "CW": partial(library_attack, "CW", steps=2, norm="l2"),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_attack_refuses_what_would_pass_for_robust(name: str, small_net, batch) -> None:
    images, labels = batch
    attack = PUBLIC[name]
    with pytest.raises(ValueError, match="gives probabilities"):
        attack(Chances(small_net), images, labels, eps=EPS)
    with pytest.raises(ValueError, match="labels must be in 0..3"):
        attack(small_net, images, labels + 2, eps=EPS)
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        attack(small_net, 255 * images, labels, eps=EPS)
    with pytest.raises(ValueError, match="eps|radius"):
        attack(small_net, images, labels, eps=-EPS)
    with pytest.raises(ValueError, match="1 x 1 pixels are too small"):
        attack(small_net, images[..., :1, :1], labels, eps=EPS)
    found = attack(small_net, images[:3], labels[:3], eps=EPS)
    assert (found - images[:3]).abs().max() <= EPS + 1e-6 and found.shape == images[:3].shape


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_attack_doubts_a_sigmoid(name: str, small_net, batch) -> None:
    with pytest.warns(UserWarning, match="Take the sigmoid off"):
        PUBLIC[name](Sigmoids(small_net), *batch, eps=EPS)


@pytest.mark.parametrize("name", ["pgd", "pgd_t", "eot", "linked", "reweighed"])
def test_a_step_backwards_is_refused(name: str, small_net, batch) -> None:
    with pytest.raises(ValueError, match="alpha must be in"):
        PUBLIC[name](small_net, *batch, eps=EPS, alpha=-1.0)


class _Bright(nn.Module):
    """Tells images a little brighter than the middle from others: a small change of the mean is enough."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(10.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rise = self.slope * (images.mean((1, 2, 3)) - 0.499)
        return torch.stack([-rise, rise], 1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (17, 64), (32, 32)])
def test_square_fools_on_images_of_any_shape(shape: tuple[int, int], norm: str) -> None:
    images, labels = torch.full((4, 1, *shape), 0.5), torch.ones(4, dtype=torch.int64)
    eps = 0.1 if norm == "linf" else 2.0
    found = square(_Bright().eval(), images, labels, eps=eps, queries=200, norm=norm)
    size = (found - images).flatten(1)
    size = size.abs().amax(1) if norm == "linf" else size.norm(dim=1)
    assert found.shape == images.shape and size.max() <= eps * (1 + 1e-4) and size.min() > 0
    assert (_Bright()(found).argmax(1) == 0).all()


def test_autoattack_has_its_official_budget_and_is_refused_before_other_attacks_run(small_net, monkeypatch) -> None:
    parts = library_attacks._parts(small_net, norm="Linf", eps=EPS, seed=0, classes=4, steps=100, queries=5000).attacks
    budgets = [getattr(part, "steps", getattr(part, "n_queries", None)) for part in parts]
    assert budgets == [100, 100, 100, 5000]
    assert (library_attacks.AUTOATTACK_STEPS, library_attacks.AUTOATTACK_QUERIES) == (100, 5000)
    three = nn.Sequential(small_net, nn.Linear(4, 3)).eval()
    few = toy_images(n=6, seed=0)
    few = replace(few, labels=few.labels % 3, classes=few.classes[:3])
    ran = []
    monkeypatch.setattr(Attack, "__call__", lambda *_, **__: ran.append(1))
    with pytest.raises(ValueError, match="needs four classes, and this model has 3"):
        robustness_curve(three, few, attack=(Attack("fgsm"), Attack("autoattack")), epsilons=[EPS])
    assert not ran


def test_a_new_attack_is_one_registered_class(monkeypatch: pytest.MonkeyPatch) -> None:
    from utils.attacks import attack as home

    monkeypatch.setattr(home, "_KINDS", dict(home.known_attacks()))
    monkeypatch.setattr(home, "known_attacks", lambda: home._KINDS)

    @home.register("darker")
    class Darker(home.Kind):
        title = "Darker by {options[share]}"
        sees = "nothing"

        def __call__(self, budget, model, images, labels, terms):
            return images - terms.eps * budget.options["share"] * images.sign()

    attack = Attack("darker", options={"share": 0.5})
    images = torch.full((2, 1, 4, 4), 0.5)
    attacked = attack(torch.nn.Flatten(), images, torch.zeros(2, dtype=torch.int64), eps=0.1)
    assert attacked.allclose(torch.tensor(0.45)) and attack.title == "Darker by 0.5"
    assert Attack.from_dict(attack.as_dict()) == attack and "options" not in Attack("fgsm").as_dict()
    with pytest.raises(ValueError, match="two attacks of the name 'darker'"):
        home.register("darker")(Darker)
