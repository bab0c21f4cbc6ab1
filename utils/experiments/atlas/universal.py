"""One change for everybody: fitted on training patients, tried on test patients and on the other model."""

from __future__ import annotations

import base64
from dataclasses import replace

import numpy as np
import torch

from utils.attacks.attack import Attack
from utils.core.parts import Part
from utils.data.sets import ImageSet
from utils.evaluation.attacker import learnt
from utils.experiments.atlas.bench import Bench, Whom, whom

#: Radii of the change.
EPS = (2 / 255, 4 / 255, 8 / 255)
NOISE = "random signs"


class Change(Part):
    """A change as a picture: H x W tenths of a grey level of 255, signed bytes in rows, written in base64."""

    height: int
    width: int
    tenths: str

    @classmethod
    def of(cls, shift: torch.Tensor) -> Change:
        """A shift 1 x 1 x H x W of at most 12 grey levels, as a share of the pixel range."""
        tenths = (2550 * shift[0, 0]).round().to(torch.int8).cpu().numpy()
        height, width = tenths.shape
        return cls(height=height, width=width, tenths=base64.b64encode(tenths.tobytes()).decode())

    def levels(self) -> np.ndarray:
        """Grey levels of 255, float H x W."""
        tenths = np.frombuffer(base64.b64decode(self.tenths), dtype=np.int8)
        return tenths.reshape(self.height, self.width) / 10


class UniversalFound(Part):
    """Shares are of slices that are right without change.

    Attributes:
        misclassified: model that is asked -> where the change comes from -> by radius.
        change: model -> its change at the largest radius.
    """

    whom: Whom
    fitted_on: int
    radii: list[float]
    misclassified: dict[str, dict[str, list[float]]]
    change: dict[str, Change]


def measure(bench: Bench) -> UniversalFound:
    """Fit one change for each model and radius, and try each on both models."""
    train, radii = bench.train_slices(), bench.radii(EPS)
    one = Attack("universal", steps=bench.budget.epochs, options={"images": len(train)})
    sources = {f"from {source}": replace(one, surrogate=source) for source in bench.models} | {NOISE: Attack("noise")}
    found = {
        name: {title: [_turned(bench, name, attack, train, eps) for eps in radii] for title, attack in sources.items()}
        for name in bench.models
    }
    return UniversalFound(
        whom=whom(bench),
        fitted_on=len(train),
        radii=list(radii),
        misclassified=found,
        change={name: Change.of(_shift(bench, name, one, train, radii[-1])) for name in bench.models},
    )


def _turned(bench: Bench, name: str, attack: Attack, train: ImageSet, eps: float) -> float:
    """Share of right slices that are misclassified, at one radius by itself: at each it is another change."""
    curve = bench.attacked(
        bench.models[name], bench.slices, attack, [eps], surrogates=bench.models, batch_size=128, fit_on=train
    )
    right, robust = curve.robust_accuracy
    return (right - robust) / right if right else 0.0


def _shift(bench: Bench, name: str, attack: Attack, train: ImageSet, eps: float) -> torch.Tensor:
    return learnt(attack, bench.models[name], train, eps, seed=bench.seed, device=bench.device, cache=bench.cache)
