"""Searches of the atlas' chapters against closed forms and plain loops: regions, scans, brackets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.toy import HalfSpace, WeightedSum, toy_images
from utils.core.reproducibility import generator
from utils.data.sets import ImageSet
from utils.data.stacks import patient_stacks
from utils.evaluation.smoothing import certify
from utils.experiments.atlas import bracket, patients, regions, scans
from utils.experiments.atlas.bench import AtlasBudget, Bench

SIDE, GREY = 16, 128


def _bench(**budget: int) -> Bench:
    """A bench whose models and slices are handed over by the test itself."""
    nothing: Any = None
    return Bench({}, nothing, nothing, nothing, {}, AtlasBudget(**budget), 0, torch.device("cpu"))


def _grey(count: int) -> ImageSet:
    """Slices of one grey, all healthy."""
    images = toy_images(count, seed=0)
    return replace(
        images, images=torch.full((count, 1, SIDE, SIDE), GREY).byte(), labels=torch.zeros_like(images.labels)
    )


# --- the patient as target ------------------------------------------------------------------------------------------


def test_whom_a_narrower_change_turns_the_wider_one_turns_too() -> None:
    alone = {"free": [0.3, 0.1, None, None], "smooth": [0.2, 0.2, 0.4, None], "shared": [0.1, None, 0.5, None]}
    whom = {"patients": 4, "slices": 16, "ill": 2, "healthy": "Non", "others": "demented"}
    found = patients.PatientsFound.model_validate({"whom": whom, "radii": [0.1], "smallest": {"plain": alone}})
    nested = found.nested()["plain"]
    assert nested == {"free": [0.1, 0.1, 0.4, None], "smooth": [0.1, 0.2, 0.4, None], "shared": alone["shared"]}
    assert list(nested) == list(alone)
    few = patients.PatientsFound.model_validate({"whom": whom, "radii": [0.1], "smallest": {"plain": {"free": []}}})
    assert few.nested() == {"plain": {"free": []}}


# --- the smallest region that suffices ------------------------------------------------------------------------------


def _share(enough) -> float:
    """The search of the chapter, on what is enough."""
    low, high = 0.0, 1.0
    for _ in range(regions.HALVINGS):
        middle = high / 2 if low == 0 else (low * high) ** 0.5
        low, high = (low, middle) if enough(middle) else (middle, high)
    return round(high, 4)


@pytest.mark.parametrize("needed", [1, 3, 10, 60, 200])
def test_the_smallest_region_of_a_linear_model_has_its_heaviest_pixels(needed: int) -> None:
    weights = 1 + torch.rand(1, SIDE, SIDE, generator=generator(1))
    sorted_weights = weights.flatten().sort(descending=True).values
    # between what one pixel fewer gives and what so many give, beyond what the grey itself gives
    gained = regions.EPS * float(sorted_weights[: needed - 1].sum() + sorted_weights[:needed].sum()) / 2
    model = WeightedSum(weights, gained + (GREY / 255 - 0.5) * float(weights.sum()))
    found = regions._sufficient(_bench(steps=20), model, _grey(2))
    expected = _share(lambda share: round(share * SIDE**2) >= needed)
    assert found.shares == [expected] * 2 and found.unchanged == 0
    # pixels at random must be more: on average they weigh less
    order = torch.rand(SIDE**2, generator=generator(2)).argsort()
    at_random = regions.EPS * weights.flatten()[order].cumsum(0)
    assert expected <= _share(lambda share: at_random[max(1, round(share * SIDE**2)) - 1] >= gained)
    # and the region that is told does turn the answer
    mask = regions.top_share(weights[None], torch.tensor([expected]))
    assert regions._fooled(_bench(steps=20), model, _grey(1), mask, [regions.EPS]).tolist() == [[True]]


def test_where_nobody_is_right_or_changed_there_is_no_region() -> None:
    model, some = WeightedSum(torch.ones(1, SIDE, SIDE), 1e3), _grey(3)
    unmoved = regions._sufficient(_bench(steps=3), model, some)
    assert unmoved.shares == [] and unmoved.unchanged == 3 and np.max(unmoved.seen) == 0
    none = some.subset(torch.zeros(0, dtype=torch.long))
    nobody = regions._sufficient(_bench(steps=3), model, none)
    assert nobody.shares == [] and nobody.unchanged == 0
    told = regions._regions(_bench(steps=3), model, none)
    assert {region.area for region in told.values()} == {0.0}


# --- the worst plausible scan ---------------------------------------------------------------------------------------


def _shifted(slices: torch.Tensor, kind: str, severity: int, draws: torch.Generator) -> torch.Tensor:
    return (slices + float(torch.rand((), generator=draws)) - 0.5).clamp(0, 1)


def test_the_worst_scan_is_that_of_a_plain_loop_and_more_draws_find_no_fewer(monkeypatch) -> None:
    monkeypatch.setattr(scans, "corrupt_slices", _shifted)
    stacks = patient_stacks(toy_images(64, seed=3), 2)
    means = stacks.pixels(slice(None)).mean((1, 2, 3))
    truth = (torch.arange(len(stacks)) % 2).bool().numpy()
    clean = np.where(np.arange(len(stacks)) % 4 == 3, ~truth, truth).astype(float)  # a quarter is wrong already
    counts = []
    for number in (1, 4, 8):
        own = replace(_bench(draws=number), stacks=stacks, thresholds={"net": 0.5})
        monkeypatch.setattr(Bench, "verdict", lambda *_: HalfSpace())
        found = scans._worst(own, "motion", "net", clean, truth)
        turned = []
        for place, subject in enumerate(stacks.subjects.tolist()):
            draws = [generator(0, "worst", "motion", subject, draw) for draw in range(number)]
            shifts = [float(torch.rand((), generator=drawn)) - 0.5 for drawn in draws]
            pixels = stacks.pixels(slice(place, place + 1))
            said = [bool((pixels + shift).clamp(0, 1).mean() > 0.5) for shift in shifts]
            turned.append([own != truth[place] for own in said])
        right = (clean >= 0.5) == truth
        assert found.one.count == sum(own[0] for own, ok in zip(turned, right) if ok)
        assert found.worst.count == sum(any(own) for own, ok in zip(turned, right) if ok)
        assert found.worst.of == right.sum() < len(means)
        counts.append(found.worst.count)
    assert counts == sorted(counts) and counts[-1] > found.one.count


# --- the bracket's upper end ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [0.2, 0.4, 0.9])
def test_the_attack_turns_a_half_space_within_one_step_of_its_distance(distance: float) -> None:
    stack = torch.full((1, 2, 8, 8), 0.5 + distance / 128**0.5)
    upper = bracket._upper(_bench(steps=20, samples=200), HalfSpace(), stack, 1, 50)
    beyond = [radius for radius in bracket.RADII if radius >= distance]
    assert upper in beyond[:2]
    sure = certify(HalfSpace(), stack, sigma=bracket.SIGMA, draws=generator(0), samples=1000)
    assert sure.answer == 1 and sure.radius <= distance <= upper
