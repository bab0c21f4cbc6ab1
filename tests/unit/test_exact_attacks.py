"""Attacks against closed forms, libraries and simpler attacks on the same images, and what each of them refuses."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchattacks
from PIL import Image
from torch import nn

from tests.toy import EPS, WeightedSum, toy_images, train_toy
from utils.attacks.apgd import apgd
from utils.attacks.attack import Attack
from utils.attacks.balls import distance, project
from utils.attacks.gradient import fgsm, pgd
from utils.attacks.library import LIBRARY, auto_attack, library_attack, settings_of, square
from utils.attacks.linked import linked_pgd
from utils.attacks.reweighed import Members, reweighed_pgd
from utils.attacks.universal import universal_perturbation
from utils.attacks.views import eot_pgd, resized, turned, windowed
from utils.evaluation.worst_case import robustness_curve

RADII = {"linf": EPS, "l2": 0.5, "l0": 4}


def _draws(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return train_toy(0)


@pytest.fixture(scope="module")
def hardened() -> nn.Module:
    return train_toy(0, hardened=True)


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    images = toy_images(64, seed=5)
    return images.pixels(slice(None)), images.labels


def _loss(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return nn.functional.cross_entropy(net(images), labels).item()


def _wrong(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return net(images).argmax(1) != labels


# --- those that others are measured by ------------------------------------------------------------------------------


def test_noise_lies_at_the_edge_and_its_seed_tells_it(net: nn.Module) -> None:
    grey, labels = torch.full((3, 1, 16, 16), 0.5), torch.zeros(3, dtype=torch.long)
    found = Attack("noise")(net, grey, labels, eps=EPS, draws=_draws())
    torch.testing.assert_close((found - grey).abs(), torch.full_like(grey, EPS))
    assert torch.equal(found, Attack("noise")(net, grey, labels, eps=EPS, draws=_draws()))
    long = Attack("noise")(net, grey, labels, eps=0.5, norm="l2", draws=_draws())
    torch.testing.assert_close(distance(long - grey, "l2"), torch.full((3,), 0.5))
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        Attack("noise")(net, 255 * grey, labels, eps=EPS)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_several_steps_raise_the_loss_more_than_one(norm: str, net: nn.Module, batch) -> None:
    one = fgsm(net, *batch, eps=RADII[norm], norm=norm)
    many = Attack("ifgsm", steps=10)(net, *batch, eps=RADII[norm], norm=norm)
    assert _loss(net, many, batch[1]) > _loss(net, one, batch[1]) > _loss(net, *batch)


def test_pgd_in_l2_is_that_of_torchattacks(net: nn.Module, batch) -> None:
    ours = pgd(net, *batch, eps=0.5, alpha=0.1, steps=8, random_start=False, norm="l2")
    theirs = torchattacks.PGDL2(net, eps=0.5, alpha=0.1, steps=8, random_start=False)(*batch)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def test_the_targeted_ifgsm_is_the_targeted_bim_of_torchattacks(net: nn.Module, batch) -> None:
    images, labels = batch
    theirs = torchattacks.BIM(net, eps=EPS, alpha=EPS / 4, steps=7)
    theirs.set_mode_targeted_by_function(lambda _, own: (own + 1) % 4)
    expected = theirs(images, labels)
    for label in range(4):
        own = labels == label
        attack = Attack("ifgsm_t", steps=7, alpha=EPS / 4, options={"target": [(label + 1) % 4]})
        torch.testing.assert_close(attack(net, images[own], labels[own], eps=EPS), expected[own], atol=1e-6, rtol=0)


def test_several_targeted_steps_hit_more_often_than_one(net: nn.Module, batch) -> None:
    aim = (batch[1] + 1) % 4

    def hits(steps: int) -> float:
        found = torch.empty_like(batch[0])
        for label in range(4):
            own, target = batch[1] == label, {"target": [(label + 1) % 4]}
            found[own] = Attack("ifgsm_t", steps=steps, options=target)(net, batch[0][own], batch[1][own], eps=EPS)
        return float((net(found).argmax(1) == aim).float().mean())

    assert hits(10) > hits(1)


@pytest.mark.slow
def test_auto_pgd_breaks_no_fewer_than_fgsm_and_pgd(hardened: nn.Module, batch) -> None:
    found = _wrong(hardened, apgd(hardened, *batch, eps=EPS, steps=30, generator=_draws()), batch[1]).sum()
    simpler = fgsm(hardened, *batch, eps=EPS), pgd(hardened, *batch, eps=EPS, steps=30, generator=_draws())
    assert all(found >= _wrong(hardened, own, batch[1]).sum() for own in simpler)


def test_square_breaks_more_than_noise(net: nn.Module, batch) -> None:
    found = square(net, *batch, eps=EPS, queries=300)
    noise = Attack("noise")(net, *batch, eps=EPS, draws=_draws())
    assert _wrong(net, found, batch[1]).sum() > _wrong(net, noise, batch[1]).sum()
    with pytest.raises(ValueError, match="queries must be a whole number of at least 1"):
        square(net, *batch, eps=EPS, queries=0)


def test_autoattack_is_that_of_torchattacks_and_no_weaker_than_its_first_part(
    hardened: nn.Module, batch, monkeypatch
) -> None:
    images, labels = batch[0][:8], batch[1][:8]
    # its 5,000 queries would take half a minute
    shorter = partial(torchattacks.Square, n_queries=100)
    monkeypatch.setattr(
        "torchattacks.attacks.autoattack.Square",
        lambda *given, **named: shorter(*given, **{k: v for k, v in named.items() if k != "n_queries"}),
    )
    ours = auto_attack(hardened, images, labels, eps=EPS, steps=10, queries=100, seed=0)
    theirs = torchattacks.AutoAttack(hardened, eps=EPS, seed=0, n_classes=4)
    torch.testing.assert_close(ours, theirs(images, labels))
    first = torchattacks.APGD(hardened, eps=EPS, steps=10, seed=0, loss="ce")(images, labels)
    assert (_wrong(hardened, ours, labels) | ~_wrong(hardened, first, labels)).all()
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
        auto_attack(hardened, images, labels, eps=EPS, steps=0)


#: AutoAttack has its test above; SparseFool takes minutes; the last two only know three planes.
ALONE = ("AutoAttack", "SparseFool", "TIFGSM", "Pixle")


@pytest.mark.parametrize(
    ("name", "norm"), [(name, norm) for name, norms in LIBRARY.items() for norm in norms if name not in ALONE]
)
def test_a_name_of_torchattacks_is_that_attack(name: str, norm: str, net: nn.Module, batch) -> None:
    images, labels, eps = batch[0][:8], batch[1][:8], RADII[norm]
    ours = Attack(name, steps=3)(net, images, labels, eps=eps, norm=norm)
    given = {"eps": eps, "steps": 3, "n_queries": 3, "n_classes": 4, "pixels": eps, "seed": 0}
    known = settings_of(name)
    given |= {"norm": {"linf": "Linf", "l2": "L2"}.get(norm), "alpha": 2.5 * eps / (3 if "steps" in known else 2)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        np.random.seed(0)
        attack = getattr(torchattacks, name)(net, **{word: value for word, value in given.items() if word in known})
        theirs = attack(images.clone(), labels)
    torch.testing.assert_close(ours, (images + project(theirs - images, eps, norm)).clamp(0, 1), atol=1e-6, rtol=0)


def test_a_library_attack_without_steps_is_refused(net: nn.Module, batch) -> None:
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
        library_attack("BIM", net, *batch, eps=EPS, steps=0)


# --- inside a mask --------------------------------------------------------------------------------------------------


def _signs(side: int = 8) -> torch.Tensor:
    return (torch.randint(0, 2, (1, side, side), generator=_draws()) * 2 - 1).float()


def test_inside_a_mask_the_best_change_of_a_linear_model_is_found(tmp_path: Path) -> None:
    weights, grey = _signs(), torch.full((2, 1, 8, 8), 0.5)
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    labels = torch.zeros(2, dtype=torch.long)
    expected = (0.1 * weights * mask).expand(2, 1, 8, 8)
    found = pgd(WeightedSum(weights), grey, labels, eps=0.1, steps=10, mask=mask, assume_checked=True)
    torch.testing.assert_close(found - grey, expected)
    assert ((found - grey) * (1 - mask)).abs().max() == 0
    # a mask of one's own, as a file
    path = tmp_path / "left half.png"
    Image.fromarray((255 * mask).byte().numpy()).resize((32, 32), Image.Resampling.NEAREST).save(path)
    large, own = torch.full((1, 1, 32, 32), 0.5), _signs(32)
    attack = Attack("region", options={"mask": str(path)})
    assert attack.title == "PGD-20 in the mask left half.png"
    shift = attack(WeightedSum(own), large, labels[:1], eps=0.1) - large
    torch.testing.assert_close(shift[..., :16], 0.1 * own[None, ..., :16])
    assert shift[..., 16:].abs().max() == 0


def test_masks_that_do_not_fit_are_refused(net: nn.Module, batch, tmp_path: Path) -> None:
    images = batch[0]
    with pytest.raises(ValueError, match=r"mask of \(3, 3\) does not fit images of \(64, 1, 16, 16\)"):
        pgd(net, *batch, eps=EPS, mask=torch.ones(3, 3))
    with pytest.raises(ValueError, match="does not fit"):
        pgd(net, *batch, eps=EPS, mask=torch.ones(64, 3, 16, 16))
    with pytest.raises(ValueError, match="1 where an image may be changed"):
        pgd(net, *batch, eps=EPS, mask=7 * torch.ones_like(images))
    for options in ({"part": "brain", "mask": "x.png"}, {}, {"part": "skull"}):
        with pytest.raises(ValueError, match="takes the option part, one of"):
            Attack("region", options=options)
    Image.new("L", (32, 32)).save(tmp_path / "black.png")
    with pytest.raises(ValueError, match="white nowhere"):
        Attack("region", options={"mask": str(tmp_path / "black.png")})
    with pytest.raises(ValueError, match="path of a picture, not 7"):
        Attack("region", options={"mask": 7})
    with pytest.raises(OSError):
        Attack("region", options={"mask": str(tmp_path / "none.png")})
    Image.new("L", (32, 32), 255).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="does not fit"):
        Attack("region", options={"mask": str(tmp_path / "large.png")})(net, *batch, eps=EPS)


def test_another_mask_under_the_same_name_is_another_attack(net: nn.Module, tmp_path: Path) -> None:
    images, path = toy_images(16, seed=5), tmp_path / "mask.png"
    mask, robust = np.zeros((16, 16), np.uint8), {}
    mask[0, 0] = 255  # a single pixel, then all
    for name in ("one", "all"):
        Image.fromarray(mask).save(path)
        attack = Attack("region", options={"mask": str(path)})
        curve = robustness_curve(net, images, attack=attack, epsilons=[0.2], cache=tmp_path / "cache")
        robust[name] = curve.robust_accuracy[1]
        mask[:] = 255
    assert robust["one"] > robust["all"]


# --- a patient's slices, views, a vote, one for all -----------------------------------------------------------------


def test_free_slices_of_a_patient_are_plain_pgd_and_a_shared_change_follows_the_summed_gradient() -> None:
    weights = torch.randn(4, 8, 8, generator=_draws())
    stacks, labels = torch.full((2, 4, 8, 8), 0.5), torch.zeros(2, dtype=torch.long)
    model = WeightedSum(weights)
    free = linked_pgd(model, stacks, labels, link="free", eps=0.1, steps=10, generator=_draws())
    torch.testing.assert_close(free - stacks, (0.1 * weights.sign()).expand(2, 4, 8, 8))
    shared = linked_pgd(model, stacks, labels, link="shared", eps=0.1, steps=40, generator=_draws())
    torch.testing.assert_close(shared - stacks, (0.1 * weights.sum(0).sign()).expand(2, 4, 8, 8))


def test_an_expectation_over_nothing_is_plain_pgd(net: nn.Module, batch, monkeypatch) -> None:
    monkeypatch.setattr("utils.attacks.views.VIEWS", {"as it is": lambda images, draws: images})
    one = eot_pgd(net, *batch, eps=EPS, steps=5, samples=3, generator=_draws())
    torch.testing.assert_close(one, pgd(net, *batch, eps=EPS, steps=5, generator=_draws()))


def test_views_by_hand() -> None:
    ramp = torch.linspace(0, 1, 32).expand(1, 1, 32, 32).contiguous()
    draws = _draws()
    gain, shift = (low + (high - low) * float(torch.rand((), generator=draws)) for low, high in ((0.95, 1.05), (-5, 5)))
    torch.testing.assert_close(windowed(ramp, _draws()), (ramp * gain + shift / 255).clamp(0, 1))
    # a ramp is the same after resizing, and a disc after turning, but for their edges
    assert (resized(ramp, _draws()) - ramp)[..., 2:-2].abs().max() < 0.02
    y, x = torch.meshgrid(torch.arange(33) - 16.0, torch.arange(33) - 16.0, indexing="ij")
    disc = (1 - (x**2 + y**2).sqrt() / 16).clamp(min=0)[None, None]
    assert (turned(disc, _draws()) - disc).abs().max() < 0.03
    spoke = (y.abs() < 1).float()[None, None]
    turn = (turned(spoke, _draws()) - spoke)[0, 0]
    assert turn[16, 16].abs() < 0.05 < turn[:, 0].abs().max()  # the middle stays, the ends move


def test_a_vote_of_one_is_attacked_as_that_one(net: nn.Module, batch) -> None:
    one = reweighed_pgd(Members(nn.ModuleList([net])), *batch, eps=EPS, steps=5, generator=_draws())
    torch.testing.assert_close(one, pgd(net, *batch, eps=EPS, steps=5, loss="margin", generator=_draws()))


# --- what they refuse -----------------------------------------------------------------------------------------------


def test_slices_of_their_own_cannot_be_tied(net: nn.Module, batch) -> None:
    for link, said in (("smooth", "smooth from slice to slice"), ("shared", "one change for all slices")):
        with pytest.raises(ValueError, match=f"'{said}' ties the slices of a patient"):
            Attack("linked", options={"link": link})(net, *batch, eps=EPS)
    free = Attack("linked", steps=5, options={"link": "free"})(net, *batch, eps=EPS)
    assert _loss(net, free, batch[1]) > _loss(net, *batch)


def test_an_empty_batch_for_all_is_refused(net: nn.Module) -> None:
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1"):
        universal_perturbation(net, toy_images(8, seed=1), eps=EPS, batch_size=0)
