"""A vote attacked as the one system that it is: one image for all members, judged by the vote's own rule.

A vote has no single best gradient: a hard vote has none at all, and the mean of probabilities saturates. So
several smooth stand-ins are attacked, and each member, and the outputs alone; an image counts as robust only if
it is right under all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from pydantic import AliasChoices, Field
from torch import nn

from utils.attacks.attack import Attack
from utils.attacks.reweighed import Members
from utils.attacks.suites import SUITES, Threat
from utils.core.parts import Part
from utils.data.sets import ImageSet
from utils.evaluation.attacker import predict_batch
from utils.evaluation.curve import NEVER, RobustnessCurve, combine, share_robust
from utils.evaluation.ensemble import Vote, mix
from utils.evaluation.metrics import predict
from utils.evaluation.worst_case import robustness_curve

PROBABILITIES, LOGITS, LOSSES_SUM = "mean probability", "mean logits", "sum of member losses"
MEMBERS = "all members"
#: By what members are attacked on their own, where the suite itself is weaker than what the vote gets: no margin, no
#: targets.
_MEMBERS_BY = {"quick": "brief"}


class VoteAttack(Part):
    """A vote under each kind of attack; lists are robust accuracies by radius.

    Attributes:
        rule: of the vote.
        alone: title of each attack -> robust accuracy under it alone.
        joint: under all attacks on stand-ins; ``transfer_only``: under all made on members.
        members: each member attacked on its own by ``members_by``; ``best_member`` is the best of them at each radius.
        oracle: share of images that at least one member still gets right on every image that broke the vote.
        without_reweighing: under all attacks but the re-weighted one; empty in records from before it.
    """

    rule: str
    alone: dict[str, list[float]]
    joint: list[float]
    transfer_only: list[float] = Field(validation_alias=AliasChoices("transfer_only", "transfer only"))
    members: dict[str, list[float]]
    members_by: list[str] = Field(default_factory=lambda: ["FGSM", "PGD-20"])
    best_member: list[float] = Field(validation_alias=AliasChoices("best_member", "best member"))
    oracle: list[float]
    without_reweighing: list[float] = Field(default_factory=list)


class _Surrogate(nn.Module):
    """A smooth stand-in for a vote: ``kind`` is one of the three names above."""

    def __init__(self, vote: Vote, kind: str) -> None:
        super().__init__()
        self.vote, self.kind = vote, kind

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = torch.stack([member(images) for member in self.vote.members])
        if self.kind == PROBABILITIES:
            return mix(logits.log_softmax(-1), self.vote.shares)
        shares = self.vote.shares[:, None, None]
        return (shares * (logits if self.kind == LOGITS else logits.log_softmax(-1))).sum(0)


def surrogates(vote: Vote, names: Sequence[str]) -> dict[str, nn.Module]:
    """Stand-ins by name: the three smooth ones, all members beside each other, and each under its own name."""
    smooth: dict[str, nn.Module] = {k: _Surrogate(vote, k).eval() for k in (PROBABILITIES, LOGITS, LOSSES_SUM)}
    return smooth | {MEMBERS: Members(vote.members).eval()} | dict(zip(names, vote.members))


def vote_attacks(suite: str, names: Sequence[str]) -> tuple[list[Attack], list[Attack], list[Attack]]:
    """Attacks on the stand-ins, transfers from the members, and attacks on the outputs alone.

    Args:
        suite: key of :data:`utils.attacks.suites.SUITES`; budgets of PGD and Square are those of that suite.
        names: of the members.
    """
    pgd = next(attack for attack in SUITES[suite] if attack.name == "pgd")
    # what fools a stand-in need not fool the vote, so no sample may be left early
    pgd = replace(pgd, stop_when_fooled=False)
    joint = [replace(pgd, surrogate=kind, loss="ce") for kind in (PROBABILITIES, LOGITS)]
    joint += [
        replace(pgd, surrogate=LOSSES_SUM, loss="nll"),
        replace(pgd, surrogate=LOGITS, loss="margin"),
        replace(pgd, surrogate=PROBABILITIES, loss="margin"),
        Attack("reweighed", steps=pgd.steps, restarts=pgd.restarts, alpha=pgd.alpha, surrogate=MEMBERS),
    ]
    black = [attack for attack in SUITES[suite] if attack.kind.sees == "answers"] or [Attack("square", steps=200)]
    return joint, [replace(pgd, surrogate=name) for name in names], black


def attack_vote(
    vote: Vote,
    images: ImageSet,
    *,
    epsilons: Sequence[float],
    suite: str = "standard",
    names: Sequence[str] = (),
    seed: int = 0,
    threat: Threat | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    cache: Path | None = None,
) -> tuple[RobustnessCurve, VoteAttack]:
    """Attack a vote by every stand-in, every member and Square, each on all images, and take the worst case.

    Args:
        names: of the members; () numbers them.
        images, epsilons, seed, threat, batch_size, device, precision, cache: see
            :func:`utils.evaluation.worst_case.robustness_curve`.

    Returns:
        the worst case over all attacks, and what each kind of them leaves.
    """
    names = list(names) or [f"member {number}" for number in range(1, len(vote.members) + 1)]
    stand_ins = surrogates(vote, names)
    joint, transfer, black = vote_attacks(suite, names)
    measure = partial(
        robustness_curve,
        images=images,
        epsilons=epsilons,
        seed=seed,
        threat=threat,
        batch_size=batch_size,
        device=device,
        precision=precision,
        cache=cache,
    )
    oracle = _Oracle(vote, images, device)
    curves = {
        attack.title: measure(vote, attack=attack, surrogates=stand_ins, on_broken=oracle)
        for attack in (*joint, *transfer, *black)
    }
    by = SUITES[_MEMBERS_BY.get(suite, suite)]
    own = {name: measure(member, attack=by) for name, member in zip(names, vote.members)}
    worst = combine(list(curves.values()))
    kinds = {
        kind: combine([curves[attack.title] for attack in attacks], title=kind).robust_accuracy
        for kind, attacks in (("joint", joint), ("transfer only", transfer))
    }
    members = {name: curve.robust_accuracy for name, curve in own.items()}
    others = [curves[attack.title] for attack in (*joint, *transfer, *black) if attack.surrogate != MEMBERS]
    table = VoteAttack(
        rule=vote.rule,
        alone={title: curve.robust_accuracy for title, curve in curves.items()},
        joint=kinds["joint"],
        transfer_only=kinds["transfer only"],
        members=members,
        members_by=[attack.title for attack in by],
        best_member=[max(values) for values in zip(*members.values())],
        oracle=[share_robust(oracle.first_lost, step) for step in range(len(worst.epsilons))],
        without_reweighing=combine(others).robust_accuracy,
    )
    return worst, table


class _Oracle:
    """The first radius at which all members were wrong at once, on an attacked image that broke the vote."""

    def __init__(self, vote: Vote, images: ImageSet, device: torch.device | str) -> None:
        self.vote, self.labels, self.device = vote, images.labels, device
        clean = torch.stack([predict(member, images, device=device).argmax(1) for member in vote.members])
        self.first_lost = torch.where((clean == images.labels).any(0), NEVER, 0)

    def __call__(self, index: torch.Tensor, attacked: torch.Tensor, step: int) -> None:
        pixels, labels = attacked.to(self.device), self.labels[index]
        answers = torch.stack([predict_batch(member, pixels).argmax(1).cpu() for member in self.vote.members])
        lost, before = (answers != labels).all(0), self.first_lost[index]
        self.first_lost[index] = torch.where(lost & ((before == NEVER) | (before > step)), step, before)
