"""What survives saving and viewing: of the slices that an attack changed, who is still misclassified afterwards."""

from __future__ import annotations

import torch
from torch import nn

from utils.attacks.attack import Attack
from utils.attacks.views import VIEWS, View
from utils.core.parts import Part
from utils.core.reproducibility import generator
from utils.data.sets import ImageSet
from utils.evaluation.attacker import predict_batch
from utils.experiments.atlas.bench import Bench, Whom, whom

#: Radii of the attacks.
EPS = (1 / 255, 2 / 255, 4 / 255)
WITHOUT = "no attack"


class Survived(Part):
    """One attack at one radius.

    Attributes:
        misclassified: right slices that the attack changed.
        survives: view -> share of these, over the draws of the view, that are still misclassified; None where the
            attack changed none.
    """

    misclassified: int
    survives: dict[str, float | None]


class SurvivalFound(Part):
    """Attributes:
    right: model -> slices that are right without attack.
    by_view: model -> view -> share of these that the view alone misclassifies.
    attacks: model -> attack -> by radius.
    """

    whom: Whom
    radii: list[float]
    draws: int
    right: dict[str, int]
    by_view: dict[str, dict[str, float]]
    attacks: dict[str, dict[str, list[Survived]]]


def measure(bench: Bench) -> SurvivalFound:
    """PGD, and PGD on the expectation over views, each seen through every view."""
    right, alone, found = {}, {}, {}
    images = bench.few()
    for name, model in bench.models.items():
        pixels, labels = images.pixels(slice(None), bench.device), images.labels.to(bench.device)
        kept = predict_batch(model, pixels).argmax(1) == labels
        pixels, labels = pixels[kept], labels[kept]
        right[name] = len(labels)
        alone[name] = {title: _wrong(bench, model, pixels, labels, view) or 0.0 for title, view in VIEWS.items()}
        found[name] = {
            attack.title: [_survived(bench, model, images, attack, eps) for eps in bench.radii(EPS)]
            for attack in (Attack("pgd", steps=bench.budget.steps), Attack("eot", steps=bench.budget.steps))
        }
    return SurvivalFound(
        whom=whom(bench),
        radii=list(bench.radii(EPS)),
        draws=bench.budget.views,
        right=right,
        by_view=alone,
        attacks=found,
    )


def _survived(bench: Bench, model: nn.Module, images: ImageSet, attack: Attack, eps: float) -> Survived:
    """One radius by itself: what a smaller one found would survive less."""
    places, attacked = bench.misclassified(model, images, attack, eps)
    labels = images.labels[places].to(bench.device)
    return Survived(
        misclassified=len(labels),
        survives={title: _wrong(bench, model, attacked, labels, view) for title, view in VIEWS.items()},
    )


def _wrong(bench: Bench, model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, view: View) -> float | None:
    """Share of images that are misclassified once seen so, over the draws."""
    if not len(labels):
        return None
    draws = generator(bench.seed, "view")
    seen = [predict_batch(model, view(pixels, draws)).argmax(1) != labels for _ in range(bench.budget.views)]
    return float(torch.stack(seen).float().mean())
