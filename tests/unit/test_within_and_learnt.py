"""Evaluations that may change only a part of each image, and what fitted attacks learnt, kept on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.toy import EPS, SIDE, WeightedSum, toy_images
from utils.attacks.attack import Attack, Kind, known_attacks
from utils.attacks.suites import Threat
from utils.core.reproducibility import generator
from utils.data.sets import ImageSet
from utils.evaluation.attacker import Attacker, learnt
from utils.evaluation.worst_case import robustness_curve


def _halves(count: int) -> torch.Tensor:
    """Of every other image the left half, else the right one."""
    mask = torch.zeros(count, 1, SIDE, SIDE, dtype=torch.bool)
    mask[::2, ..., : SIDE // 2], mask[1::2, ..., SIDE // 2 :] = True, True
    return mask


def _all_healthy(count: int) -> ImageSet:
    images = toy_images(count, seed=0)
    return replace(images, images=torch.full_like(images.images, 128), labels=torch.zeros_like(images.labels))


# --- a part of each image -------------------------------------------------------------------------------------------


def test_each_image_is_changed_in_its_own_part_only_and_there_as_well_as_can_be() -> None:
    weights = torch.rand(1, SIDE, SIDE, generator=generator(1))
    weights[..., : SIDE // 2] *= 3  # the left half weighs more, and the border lies between what the two give
    left, right = (EPS * float(half.sum()) for half in weights.split(SIDE // 2, dim=-1))
    grey = (128 / 255 - 0.5) * float(weights.sum())
    images, mask = _all_healthy(8), _halves(8)
    model, broken = WeightedSum(weights, grey + (left + right) / 2), {}
    curve = robustness_curve(
        model,
        images,
        attack=Attack("pgd", steps=20),
        epsilons=[EPS],
        within=mask,
        on_broken=lambda index, found, _: broken.update(zip(index.tolist(), found)),
    )
    assert curve.robust(1).tolist() == [False, True] * 4 and sorted(broken) == [0, 2, 4, 6]
    for place, found in broken.items():
        shift = found - images.pixels(slice(place, place + 1))[0]
        assert (shift[~mask[place]] == 0).all() and shift[mask[place]].abs().max() > 0.9 * EPS


@pytest.mark.parametrize("name", [name for name, kind in known_attacks().items() if kind.stays_within])
def test_whoever_says_so_stays_within(name: str, toy_nets, toy_test) -> None:
    images = toy_test.subset(torch.arange(16))
    attack = Attack(name, steps=3, options={"target": "least_likely"} if name.endswith("_t") else {})
    mask, pixels = _halves(16), images.pixels(slice(None))
    found = attack(toy_nets["plain"], pixels, images.labels, eps=EPS, draws=generator(0), within=mask.to(pixels))
    assert ((found != pixels) & ~mask).sum() == 0 and (found != pixels)[mask].any()


def test_an_attack_that_would_change_the_rest_is_refused_before_any_work(toy_nets, toy_test) -> None:
    for attack in (Attack("square", steps=5), Attack("apgd", steps=5), Attack("pgd", stop_when_fooled=True)):
        with pytest.raises(ValueError, match="cannot stay within a part of the image; without stop_when_fooled can: "):
            robustness_curve(toy_nets["plain"], toy_test, attack=attack, epsilons=[EPS], within=_halves(len(toy_test)))


def test_an_attack_that_lies_about_it_is_caught(toy_nets, toy_test, monkeypatch) -> None:
    monkeypatch.setattr(type(known_attacks()["noise"]), "stays_within", True)
    with pytest.raises(ValueError, match="Noise changed pixels outside of the part that it may change"):
        robustness_curve(
            toy_nets["plain"], toy_test, attack=Attack("noise"), epsilons=[EPS], within=_halves(len(toy_test))
        )


@pytest.mark.parametrize("wrong", ["shape", "numbers", "planes"])
def test_parts_that_do_not_fit_are_refused(toy_nets, toy_test, wrong: str) -> None:
    mask = _halves(len(toy_test))
    within = {"shape": mask[:1], "numbers": mask.float(), "planes": mask}[wrong]
    threat = Threat(size=32) if wrong == "planes" else None
    with pytest.raises(ValueError, match="within must be bool, .* x 1 x 16 x 16 on grey images, not "):
        robustness_curve(
            toy_nets["plain"], toy_test, attack=Attack("pgd"), epsilons=[EPS], within=within, threat=threat
        )


def test_another_part_reads_nothing_stale(toy_nets, toy_test, tmp_path: Path) -> None:
    mask = _halves(len(toy_test))
    curves = [
        robustness_curve(
            toy_nets["plain"],
            toy_test,
            attack=Attack("pgd", steps=5),
            epsilons=[10 / 255],
            within=own,
            cache=tmp_path,
        )
        for own in (mask, ~mask, mask, None)
    ]
    assert curves[0].first_broken == curves[2].first_broken != curves[1].first_broken
    assert curves[3].robust_accuracy[1] < min(curve.robust_accuracy[1] for curve in curves[:3])


# --- what is fitted first -------------------------------------------------------------------------------------------


def _count_fits(monkeypatch) -> list[int]:
    kind, fits = type(known_attacks()["universal"]), []
    fit = kind.fit

    def counted(self: Kind, budget: Attack, *own):
        fits.append(budget.steps)
        return fit(self, budget, *own)

    monkeypatch.setattr(kind, "fit", counted)
    return fits


def test_what_was_learnt_is_kept_for_the_same_model_images_and_radius(
    toy_nets, toy_test, tmp_path: Path, monkeypatch
) -> None:
    fits, train = _count_fits(monkeypatch), toy_images(64, seed=5)
    attack = Attack("universal", steps=2)
    first = learnt(attack, toy_nets["plain"], train, EPS, cache=tmp_path)
    again = learnt(replace(attack, surrogate="other name"), toy_nets["plain"], train, EPS, cache=tmp_path)
    assert torch.equal(first, again) and len(fits) == 1
    assert torch.equal(first, learnt(attack, toy_nets["plain"], train, EPS)) and len(fits) == 2
    others = [
        learnt(attack, toy_nets["hardened"], train, EPS, cache=tmp_path),
        learnt(attack, toy_nets["plain"], toy_images(64, seed=6), EPS, cache=tmp_path),
        learnt(attack, toy_nets["plain"], train, EPS / 2, cache=tmp_path),
        learnt(attack, toy_nets["plain"], train, EPS, seed=1, cache=tmp_path),
        learnt(replace(attack, steps=3), toy_nets["plain"], train, EPS, cache=tmp_path),
    ]
    assert len(fits) == 7 and not any(torch.equal(first, other) for other in others)


def test_a_transferred_change_is_fitted_once_and_a_second_evaluation_fits_nothing(
    toy_nets, toy_test, tmp_path: Path, monkeypatch
) -> None:
    fits = _count_fits(monkeypatch)
    for victim in ("plain", "hardened"):
        for _ in range(2):
            robustness_curve(
                toy_nets[victim],
                toy_test,
                attack=Attack("universal", steps=2, surrogate="source"),
                epsilons=[EPS],
                surrogates={"source": toy_nets["plain"]},
                fit_on=toy_images(64, seed=5),
                cache=tmp_path,
            )
    assert len(fits) == 1


def test_an_attack_that_learns_nothing_cannot_be_fitted(toy_nets) -> None:
    with pytest.raises(TypeError, match="PGD-20 is not fitted on images"):
        learnt(Attack("pgd"), toy_nets["plain"], toy_images(8, seed=0), EPS)


def test_an_attacker_hands_on_the_part(toy_nets, toy_test) -> None:
    mask = _halves(len(toy_test))
    own = Attacker(toy_nets["plain"], toy_test, Threat(), {}, 0, 64, "cpu", "fp32", False, within=mask)
    found = own.attack(Attack("pgd", steps=2), torch.tensor([1, 0]), EPS, 0)
    assert found["norm"].max() <= EPS * 1.001
