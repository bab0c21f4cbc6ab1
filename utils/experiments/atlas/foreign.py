"""Images that the model does not know, and detectors of them, both under attack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F

from utils.core.parts import Part
from utils.core.reproducibility import generator
from utils.data.phantom import PhantomConfig, make_phantoms
from utils.evaluation.detectors import (
    Detector,
    Separation,
    answers_and_scores,
    fit_detectors,
    push_score,
    separation,
    share_fooled,
    share_noticed,
)
from utils.experiments.atlas.bench import Bench, Whom, whom

#: Radii by which real slices are pushed out or fooled, and by which foreign ones are pulled in.
REAL_EPS, FOREIGN_EPS = (1 / 255, 2 / 255, 4 / 255), 8 / 255
#: Share of the real validation slices that a detector accepts.
ACCEPTED = 0.95


class Pulled(Part):
    """One kind of foreign image: told from real slices before and after it was attacked, and share that is accepted."""

    before: Separation
    after: Separation
    accepted_before: float
    accepted_after: float


class Watched(Part):
    """One detector; lists are by radius of real slices.

    Attributes:
        foreign: kind of image -> how it is told before and after an attack on the score.
        refused: real slices that are refused, the first without attack.
        fooled: right real slices that are misclassified and accepted at once, by an attack that knows both; the first
            without attack.
        noticed: of those that an attack that does not know the detector misclassifies, the share that is refused.
    """

    foreign: dict[str, Pulled]
    refused: list[float]
    fooled: list[float]
    noticed: list[float | None]


class ForeignFound(Part):
    """Model -> detector -> what it is worth."""

    whom: Whom
    radii: list[float]
    foreign_radius: float
    images: int
    detectors: dict[str, dict[str, Watched]]


def measure(bench: Bench) -> ForeignFound:
    """Every detector of both models, attacked by somebody who knows it."""
    found, kinds = {}, foreign_images(bench)
    for name, model in bench.models.items():
        fitted = fit_detectors(model, bench.train_slices(), device=bench.device)
        found[name] = {
            title: bench.piece("foreign", f"{name} {title}", Watched, partial(_watched, bench, detector, kinds))
            for title, detector in fitted.items()
        }
    return ForeignFound(
        whom=whom(bench),
        radii=list(bench.radii(REAL_EPS)),
        foreign_radius=FOREIGN_EPS,
        images=len(bench.few()),
        detectors=found,
    )


def foreign_images(bench: Bench) -> dict[str, torch.Tensor]:
    """Kind -> as many images as ``bench.few()`` has, of its shape, N x 1 x H x W in [0, 1]."""
    real = bench.few().pixels(slice(None), bench.device)
    draws = generator(bench.seed, "foreign")

    def drawn(make: Callable[..., torch.Tensor], *shape: int) -> torch.Tensor:
        return make((len(real), 1, *shape), generator=draws).to(real)

    clouds = F.interpolate(drawn(torch.rand, 6, 6), real.shape[-2:], mode="bicubic").clamp(0, 1)
    return {
        "noise": drawn(torch.rand, *real.shape[-2:]),
        "clouds": clouds,
        "upside-down slices": real.flip(-2),
        "drawn heads": _phantoms(real),
    }


def _phantoms(real: torch.Tensor) -> torch.Tensor:
    raw = make_phantoms(PhantomConfig(n_subjects=8, n_levels=4))
    pixels = torch.from_numpy(raw.pixels)[:, None].float().to(real) / 255
    chosen = torch.arange(len(real), device=real.device) % len(pixels)
    return F.interpolate(pixels[chosen], real.shape[-2:], mode="bilinear").clamp(0, 1)


def _watched(bench: Bench, detector: Detector, kinds: Mapping[str, torch.Tensor]) -> Watched:
    images, validation = bench.few(), bench.splits.validation.balanced_subset(max(200, bench.budget.images))
    pixels = images.pixels(slice(None), bench.device)
    limit = float(answers_and_scores(detector, validation.pixels(slice(None), bench.device))[1].quantile(ACCEPTED))
    logits, real = answers_and_scores(detector, pixels)
    right = images.subset(torch.nonzero(logits.argmax(1) == images.labels)[:, 0])
    refused, steps, radii = [float((real > limit).float().mean())], bench.budget.steps, bench.radii(REAL_EPS)
    noticed: list[float | None] = [None]
    for eps in radii:
        draws = generator(bench.seed, "out", eps)
        pushed = push_score(detector, pixels, eps=eps, up=True, steps=steps, draws=draws)
        refused.append(float((answers_and_scores(detector, pushed)[1] > limit).float().mean()))
        noticed.append(share_noticed(detector, right, limit=limit, eps=eps, steps=steps, evaluate=bench.attacked))
    fooled = share_fooled(detector, right, limit=limit, epsilons=radii, steps=2 * steps, evaluate=bench.attacked)
    return Watched(
        foreign={kind: _pulled(bench, detector, own, real, limit) for kind, own in kinds.items()},
        refused=refused,
        fooled=[0.0, *fooled],
        noticed=noticed,
    )


def _pulled(bench: Bench, detector: Detector, foreign: torch.Tensor, real: torch.Tensor, limit: float) -> Pulled:
    before = answers_and_scores(detector, foreign)[1]
    draws = generator(bench.seed, "in")
    pulled = push_score(detector, foreign, eps=FOREIGN_EPS, up=False, steps=bench.budget.steps, draws=draws)
    after = answers_and_scores(detector, pulled)[1]
    return Pulled(
        before=separation(real, before),
        after=separation(real, after),
        accepted_before=float((before <= limit).float().mean()),
        accepted_after=float((after <= limit).float().mean()),
    )
