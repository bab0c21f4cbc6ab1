"""Which way answers are turned: illness hidden or invented, and each class into each other one."""

from __future__ import annotations

from dataclasses import replace

import scipy  # loads its parts at their first use
import torch

from utils.attacks.attack import Attack
from utils.attacks.suites import notebook_attacks
from utils.attacks.targets import RELATIVE, Towards, target_mask
from utils.core.parts import Part
from utils.evaluation.curve import NEVER
from utils.evaluation.metrics import predict
from utils.experiments.atlas.bench import RADII, Bench, Whom, whom

#: Radius at which classes are turned into each other.
EPS = 2 / 255
#: What the second attack climbs by; who is reached is judged by the model itself.
_SMOOTH = "log-odds"


class Share(Part):
    """Some of many, with the 95 % interval of Wilson (1927); None where there is nobody."""

    count: int
    of: int
    low: float | None = None
    high: float | None = None

    @property
    def value(self) -> float | None:
        """0..1, or None."""
        return self.count / self.of if self.of else None


def share(count: int, of: int) -> Share:
    """A share with its interval."""
    if not of:
        return Share(count=0, of=0)
    found = scipy.stats.binomtest(count, of).proportion_ci(method="wilson")
    return Share(count=count, of=of, low=float(found.low), high=float(found.high))


class Direction(Part):
    """One model; lists are by radius.

    Attributes:
        hidden: of the ill patients that are found ill without attack, those turned to healthy.
        invented: of the healthy patients that are found healthy, those turned to ill.
        balanced: balanced accuracy by patient under attack, the first without.
    """

    hidden: list[Share]
    invented: list[Share]
    balanced: list[float]


class TargetsFound(Part):
    """Directions of harm, and reached targets.

    Attributes:
        radii: of ``directions``.
        reached: model -> true class -> wanted class -> share of slices that get that answer at ``EPS``, of those that
            have another as they are; for its own class the share that is right as it is.
        asked: model -> word for the target -> share of slices that reach it, of those that have such a target and
            another answer as they are.
    """

    whom: Whom
    radii: list[float]
    directions: dict[str, Direction]
    reached: dict[str, dict[str, dict[str, float | None]]]
    asked: dict[str, dict[str, float | None]]


def measure(bench: Bench) -> TargetsFound:
    """Patients by the worst case over FGSM, PGD on two losses and targeted APGD; slices by PGD on two margins."""
    answers = {name: predict(model, bench.slices, device=bench.device).cpu() for name, model in bench.models.items()}
    return TargetsFound(
        whom=whom(bench),
        radii=list(bench.radii(RADII)),
        directions={name: _direction(bench, name) for name in bench.models},
        reached={name: _reached(bench, name, before) for name, before in answers.items()},
        asked={name: _asked(bench, name, before) for name, before in answers.items()},
    )


def _direction(bench: Bench, name: str) -> Direction:
    patients = bench.questions()
    attacks = notebook_attacks(bench.budget.steps)
    curve = bench.attacked(bench.verdict(name), patients, attacks, bench.radii(RADII), batch_size=16)
    first, ill = torch.tensor(curve.first_broken), patients.labels == 1

    def turned(side: torch.Tensor, step: int) -> Share:
        right = side & (first != 0)
        return share(int((right & (first != NEVER) & (first <= step)).sum()), int(right.sum()))

    steps = range(1, len(curve.epsilons))
    robust = [curve.robust(step) for step in range(len(curve.epsilons))]
    return Direction(
        hidden=[turned(ill, step) for step in steps],
        invented=[turned(~ill, step) for step in steps],
        balanced=[_balanced(own, ill) for own in robust],
    )


def _balanced(right: torch.Tensor, ill: torch.Tensor) -> float:
    """Mean over the sides that are there."""
    sides = [right[side].float().mean() for side in (ill, ~ill) if side.any()]
    return float(torch.stack(sides).mean())


def _towards(
    bench: Bench, name: str, target: str | tuple[int, ...], before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which slices have such a target and another answer as they are, and which of them reach it, bool tensors."""
    wanted = target_mask(target, before, bench.slices.labels)
    asked = wanted.any(1) & ~wanted.gather(1, before.argmax(1, keepdim=True))[:, 0]
    reached = torch.zeros_like(asked)
    for classes in wanted[asked].unique(dim=0):
        index = torch.nonzero(asked & (wanted == classes).all(1))[:, 0]
        outside = bench.slices.subset(index)
        outside = replace(outside, labels=torch.zeros_like(outside.labels), classes=["elsewhere", "there"])
        # of two logits that lie far apart cross-entropy sees one alone: in float32 the other's gradient is 0
        pgd = Attack("pgd", steps=bench.budget.steps, loss="margin")
        attacks = [replace(pgd, surrogate=climbed) for climbed in ("", _SMOOTH)]
        view, smooth = (Towards(bench.models[name], classes, smooth=smooth) for smooth in (False, True))
        curve = bench.attacked(view, outside, attacks, [EPS], surrogates={_SMOOTH: smooth})
        reached[index] = torch.tensor(curve.first_broken) != NEVER
    return asked, reached


def _reached(bench: Bench, name: str, before: torch.Tensor) -> dict[str, dict[str, float | None]]:
    labels, classes = bench.slices.labels, bench.classes
    table: dict[str, dict[str, float | None]] = {own: {} for own in classes}
    for place, wanted in enumerate(classes):
        asked, reached = _towards(bench, name, (place,), before)
        for label, own in enumerate(classes):
            mine = labels == label
            # who is wanted where it belongs is not attacked: there stands what is right without attack
            hit, some = (before.argmax(1) == place, mine) if label == place else (reached, mine & asked)
            table[own][wanted] = float(hit[some].float().mean()) if some.any() else None
    return table


def _asked(bench: Bench, name: str, before: torch.Tensor) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for word in RELATIVE:
        asked, reached = _towards(bench, name, word, before)
        found[word] = float(reached[asked].float().mean()) if asked.any() else None
    return found
