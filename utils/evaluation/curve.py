"""What attacks at growing radii leave of a model: one type for a sweep, a worst case and a suite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from utils.core.parts import Part
from utils.core.radii import radius_label

NEVER = -1


def _unknown() -> torch.Tensor:
    return torch.empty(0)


class AttackRun(Part):
    """The budget of an attack that was run; see :class:`utils.attacks.attack.Attack`."""

    title: str
    name: str


class ThreatFacts(Part):
    """What an attacker might change; see :class:`utils.attacks.suites.Threat`."""

    title: str
    norm: str = "linf"
    size: int | None = None


class RobustnessCurve(Part):
    """Robust accuracy over radii for one model and a set of attacks.

    An image is robust at a radius if it is right without attack and was broken neither there nor
    at any smaller radius, by any attack: a larger ball contains the smaller ones.

    Attributes:
        title: of the attacks together.
        attacks: budgets, in the order they were run.
        threat: what the attacker may change.
        epsilons: radii, ascending, the first 0.
        robust_accuracy: share of all images, 0..1, for each radius; the first is clean accuracy.
        rounded_accuracy: the same where only adversarial images count that still fool the model once rounded
            to 8 bits within the radius; None where that was not measured (above
            :data:`utils.evaluation.attacker.ROUNDED_UP_TO`, other threats).
        first_broken: for each image the index into ``epsilons`` at which it was first wrong (0:
            without attack), ``NEVER`` if it stood.
        broken_by: for each image the index into ``attacks`` of the one that broke it, ``NEVER`` if none did.
        n_images, n_subjects: how many.
        max_norm: largest size that a perturbation had at each radius, in the threat's norm.
        seconds: of all batches, those from the cache of an interrupted evaluation and of other processes too.
        first_rounded: int64 tensor N like ``first_broken``, for ``rounded_accuracy``. Not part of the record.
        logits: radii x N x K, float32, the model's answers to the worst image found at each radius: the one
            that broke it, or else the one that came closest. Not part of the record.
    """

    title: str
    attacks: list[AttackRun]
    threat: ThreatFacts
    epsilons: list[float]
    robust_accuracy: list[float]
    rounded_accuracy: list[float | None]
    first_broken: list[int] = Field(repr=False)
    broken_by: list[int] = Field(repr=False)
    n_images: int
    n_subjects: int
    max_norm: list[float]
    seconds: float
    first_rounded: torch.Tensor = Field(default_factory=_unknown, repr=False, exclude=True)
    logits: torch.Tensor = Field(default_factory=_unknown, repr=False, exclude=True)

    @model_validator(mode="after")
    def _as_long(self) -> Self:
        for name in ("robust_accuracy", "rounded_accuracy", "max_norm"):
            if len(getattr(self, name)) != len(self.epsilons):
                raise ValueError(f"{name} and epsilons must be as long as each other")
        if not len(self.first_broken) == len(self.broken_by) == self.n_images:
            raise ValueError(f"first_broken and broken_by must have {self.n_images} entries")
        return self

    @property
    def labels(self) -> list[str]:
        """The radii for tables and figures, in the notation of the norm; the first is ``clean``."""
        return ["clean" if eps == 0 else radius_label(eps, self.threat.norm) for eps in self.epsilons]

    def at(self, eps: float) -> float:
        """Robust accuracy at one of ``epsilons``."""
        return self.robust_accuracy[self.epsilons.index(eps)]

    def robust(self, step: int) -> torch.Tensor:
        """Which images are right at every radius up to the one with index ``step``; bool tensor N."""
        first = torch.tensor(self.first_broken)
        return (first == NEVER) | (first > step)

    def __eq__(self, other: object) -> bool:
        """Whether two curves would be written alike."""
        return isinstance(other, RobustnessCurve) and self.plain() == other.plain()


def share_robust(first_broken: torch.Tensor, step: int) -> float:
    """Share of images that stand all radii up to the one with index ``step``."""
    return ((first_broken == NEVER) | (first_broken > step)).double().mean().item()


def combine(curves: Sequence[RobustnessCurve], title: str = "worst case") -> RobustnessCurve:
    """The worst case of attacks that were run one by one on the same images and radii.

    Raises:
        ValueError: no curves, or curves over other images, radii or threats.
    """
    same = {(tuple(curve.epsilons), curve.n_images, str(curve.threat)) for curve in curves}
    if len(same) != 1:
        raise ValueError("only curves over the same images, radii and threat can be combined")
    radii = curves[0].epsilons
    when, who = _earliest(torch.tensor([curve.first_broken for curve in curves]))
    offsets = torch.tensor([0, *(len(curve.attacks) for curve in curves[:-1])]).cumsum(0)
    by = torch.tensor([curve.broken_by for curve in curves]).gather(0, who[None])[0]
    rounded, _ = _earliest(torch.stack([curve.first_rounded for curve in curves]))
    logits = torch.stack([curve.logits for curve in curves])
    return RobustnessCurve(
        title=title,
        attacks=[attack for curve in curves for attack in curve.attacks],
        threat=curves[0].threat,
        epsilons=radii,
        robust_accuracy=[share_robust(when, step) for step in range(len(radii))],
        rounded_accuracy=[
            None if known is None else share_robust(rounded, step)
            for step, known in enumerate(curves[0].rounded_accuracy)
        ],
        first_broken=when.tolist(),
        broken_by=torch.where(by == NEVER, NEVER, by + offsets[who]).tolist(),
        n_images=curves[0].n_images,
        n_subjects=curves[0].n_subjects,
        max_norm=[max(norms) for norms in zip(*(curve.max_norm for curve in curves))],
        seconds=sum(curve.seconds for curve in curves),
        first_rounded=rounded,
        logits=logits.gather(0, who[None, None, :, None].expand(1, *logits.shape[1:]))[0],
    )


def _earliest(steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first radius that broke each image over the rows of ``steps``, C x N, and the row that did."""
    late = torch.iinfo(steps.dtype).max
    when, who = torch.where(steps == NEVER, late, steps).min(0)
    return torch.where(when == late, NEVER, when), who
