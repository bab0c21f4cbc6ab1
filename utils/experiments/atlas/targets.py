"""Which way answers are turned: illness hidden or invented, and each class into each other one."""

from __future__ import annotations

import scipy  # loads its parts at their first use
import torch
from torch import nn

from utils.attacks.attack import Attack
from utils.attacks.suites import notebook_attacks
from utils.core.parts import Part
from utils.evaluation.attacker import predict_batch
from utils.evaluation.curve import NEVER
from utils.experiments.atlas.bench import RADII, Bench, Whom, whom

#: Radius at which classes are turned into each other.
EPS = 2 / 255


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
    """Patients by the worst case over FGSM, PGD on two losses and targeted APGD; slices by targeted PGD."""
    return TargetsFound(
        whom=whom(bench),
        radii=list(bench.radii(RADII)),
        directions={name: _direction(bench, name) for name in bench.models},
        reached={name: _reached(bench, name) for name in bench.models},
        asked={name: _asked(bench, name) for name in bench.models},
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


def _answers_towards(bench: Bench, name: str, target: str | tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers to slices attacked towards a target, and those of the slices as they are."""
    kept, piece = bench.pieces("targets"), f"{name} to {target}".replace(" ", "_")
    known = kept.load(piece)
    if known is None:
        after, before = _attacked_towards(bench, bench.models[name], target)
        known = {"after": after, "before": before}
        kept.save(piece, known)
    return known["after"], known["before"]


def _attacked_towards(
    bench: Bench, model: nn.Module, target: str | tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    # the evaluator would leave alone who is misclassified anyway, and each slice is wanted somewhere else here
    images, after, before = bench.slices, [], []
    attack = Attack("pgd_t", steps=bench.budget.steps, options={"target": target})
    for index in torch.arange(len(images)).split(64):
        pixels, labels = images.pixels(index, bench.device), images.labels[index].to(bench.device)
        found = attack(model, pixels, labels, eps=EPS, draws=torch.Generator().manual_seed(bench.seed))
        after.append(predict_batch(model, found).cpu())
        before.append(predict_batch(model, pixels).cpu())
    return torch.cat(after), torch.cat(before)


def _reached(bench: Bench, name: str) -> dict[str, dict[str, float | None]]:
    labels, classes = bench.slices.labels, bench.classes
    table: dict[str, dict[str, float | None]] = {own: {} for own in classes}
    for place, wanted in enumerate(classes):
        after, before = _answers_towards(bench, name, (place,))
        said, there = after.argmax(1), before.argmax(1) == place
        for label, own in enumerate(classes):
            # who is wanted where it belongs is not attacked: there stands what is right without attack
            mine = (labels == label) & (~there | (place == label))
            table[own][wanted] = float((said[mine] == place).float().mean()) if mine.any() else None
    return table


def _asked(bench: Bench, name: str) -> dict[str, float | None]:
    from utils.attacks.targets import RELATIVE, target_mask

    found: dict[str, float | None] = {}
    for word in RELATIVE:
        after, before = _answers_towards(bench, name, word)
        wanted = target_mask(word, before, bench.slices.labels)
        every = torch.arange(len(after))
        some = wanted.any(1) & ~wanted[every, before.argmax(1)]
        hit = wanted[every, after.argmax(1)]
        found[word] = float(hit[some].float().mean()) if some.any() else None
    return found
