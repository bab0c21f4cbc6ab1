"""One change for everybody: fitted on training patients, tried on test patients and on the other model."""

from __future__ import annotations

import base64

import numpy as np
import torch

from utils.attacks.universal import universal_perturbation
from utils.core.parts import Part
from utils.core.reproducibility import generator
from utils.evaluation.metrics import predict
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
    train, test = bench.train_slices(), bench.slices
    right = {name: predict(model, test, device=bench.device).argmax(1) == test.labels for name, model in _models(bench)}
    found: dict[str, dict[str, list[float]]] = {name: {} for name, _ in _models(bench)}
    last: dict[str, torch.Tensor] = {}
    for eps in bench.radii(EPS):
        shifts = {
            f"from {name}": universal_perturbation(
                model, train, eps=eps, epochs=bench.budget.epochs, seed=bench.seed, device=bench.device
            )
            for name, model in _models(bench)
        }
        last = dict(shifts)
        signs = torch.randn(next(iter(shifts.values())).shape, generator=generator(bench.seed, "signs")).sign()
        shifts[NOISE] = (eps * signs).to(bench.device)
        for name, model in _models(bench):
            for source, shift in shifts.items():
                found[name].setdefault(source, []).append(_turned(bench, model, shift, right[name]))
    return UniversalFound(
        whom=whom(bench),
        fitted_on=len(train),
        radii=list(bench.radii(EPS)),
        misclassified=found,
        change={name: Change.of(last[f"from {name}"]) for name, _ in _models(bench)},
    )


def _models(bench: Bench) -> list:
    return list(bench.models.items())


def _turned(bench: Bench, model: torch.nn.Module, shift: torch.Tensor, right: torch.Tensor) -> float:
    test, wrong = bench.slices, []
    for pixels, labels in test.batches(128, bench.device):
        with torch.no_grad():
            wrong.append((model((pixels + shift).clamp(0, 1)).argmax(1) != labels).cpu())
    return float(torch.cat(wrong)[right].float().mean()) if right.any() else 0.0
