"""Robustness of a trained model with everything that a reader needs to believe it, as one JSON file.

    python -m utils robustness --model ResNet34 --data dataset/dataset_variables --suite standard

The worst case of each image over a suite of attacks at growing radii, all metrics with intervals over patients,
and the gradient checks. A killed run goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.attacks.attack import Attack
from utils.attacks.suites import Threat, check_suite
from utils.core.parts import Part
from utils.core.radii import CHECK_EPS, GRIDS, check_eps
from utils.core.reproducibility import environment_facts
from utils.data.sets import DataFacts, ImageSet
from utils.evaluation.curve import RobustnessCurve
from utils.evaluation.ensemble import Vote
from utils.evaluation.intervals import report, share_interval
from utils.evaluation.masking import Panel, masking_panel
from utils.evaluation.metrics import Metrics
from utils.evaluation.vote import VoteAttack, attack_vote
from utils.evaluation.worst_case import robustness_curve

PANEL_IMAGES = 128


class Answers(Part):
    """What a model says without attack: the probability of each answer, and whether it is right."""

    probability: list[float]
    right: list[bool]


class WorstCase(Part):
    """What attacks leave of a model, and whether to believe it.

    Attributes:
        curve: worst case of each image over all attacks.
        interval: 95 % interval over patients of robust accuracy at each radius.
        metrics: at each radius, of the worst image found for each.
        answers: without attack.
        seed: of the attacks.
        panel: gradient checks; None where they were left out.
        environment: where the attacks ran, which may be elsewhere and later than the training.
        suite, precision, compiled: of :func:`evaluate_robustness`.
        vote: of a vote, each kind of attack alone.
    """

    curve: RobustnessCurve
    interval: list[list[float] | None]
    metrics: list[Metrics]
    answers: Answers
    seed: int = 0
    panel: Panel | None
    environment: dict[str, Any] = {}
    suite: str | None = None
    precision: str | None = None
    compiled: bool | None = None
    vote: VoteAttack | None = None

    def metrics_at(self, eps: float) -> Metrics | None:
        """Metrics at a radius; None where it was not measured."""
        return dict(zip(self.curve.epsilons, self.metrics)).get(eps)


class SuiteRecord(WorstCase):
    """The file of ``python -m utils robustness``: a worst case, of which model on which data."""

    title: str
    classes: list[str]
    data: DataFacts
    note: str = ""


def evaluate_robustness(
    model: nn.Module,
    images: ImageSet,
    *,
    suite: str = "standard",
    attack: Attack | None = None,
    epsilons: Sequence[float] | None = None,
    names: Sequence[str] = (),
    threat: Threat | None = None,
    panel_images: int = PANEL_IMAGES,
    panel_eps: float | None = None,
    queries: int = 500,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    compiled: bool = False,
    cache: Path | None = None,
    fit_on: ImageSet | None = None,
) -> WorstCase:
    """The whole protocol on one model or vote.

    Args:
        suite: a key of :data:`utils.attacks.suites.SUITES`.
        attack: this one alone instead of a suite; gradient checks judge suites, and are left out.
        epsilons: radii; 0 is added. None takes the grid of the threat's norm.
        names: of a vote's members.
        panel_images, panel_eps, queries: see :func:`judge`.
        precision, compiled: of the attacks; the panel's are always made in float32 by the model as it is.
        cache: folder for finished batches.
        images, threat, seed, batch_size, device, fit_on: see :func:`utils.evaluation.worst_case.robustness_curve`.

    Raises:
        ValueError: an unknown suite, a vote to be compiled or attacked by one attack; also see
            :func:`utils.evaluation.worst_case.robustness_curve`.
    """
    attacks = check_suite(suite) if attack is None else (attack,)
    if isinstance(model, Vote):
        _check_vote(attack, compiled)
    epsilons = GRIDS[(threat or Threat()).norm] if epsilons is None else epsilons
    curve, table = _attacked(
        model,
        images,
        suite,
        attacks,
        epsilons,
        names,
        threat,
        seed,
        batch_size,
        device,
        precision,
        compiled,
        cache,
        fit_on,
    )
    judged = judge(
        model,
        images,
        curve,
        attacks=attacks,
        panel_images=0 if attack is not None else panel_images,
        panel_eps=panel_eps,
        queries=queries,
        threat=threat,
        seed=seed,
        batch_size=batch_size,
        device=device,
        cache=cache,
    )
    told: dict[str, Any] = {
        "suite": suite if attack is None else attack.name,
        "precision": precision,
        "compiled": compiled,
    }
    return judged.model_copy(update=told | ({"vote": table} if table else {}))


def _check_vote(attack: Attack | None, compiled: bool) -> None:
    if attack is not None:
        raise ValueError("a vote is attacked by a suite, through stand-ins for its rule: leave --attack out")
    if compiled:
        raise ValueError("a vote is attacked through many models, each of which would be compiled: leave --compile out")


def _attacked(
    model: nn.Module,
    images: ImageSet,
    suite: str,
    attacks: Sequence[Attack],
    epsilons: Sequence[float],
    names: Sequence[str],
    threat: Threat | None,
    seed: int,
    batch_size: int,
    device: torch.device | str,
    precision: str,
    compiled: bool,
    cache: Path | None,
    fit_on: ImageSet | None,
) -> tuple[RobustnessCurve, VoteAttack | None]:
    """The worst case of a model, or of a vote with what each kind of attack leaves of it."""
    if isinstance(model, Vote):
        return attack_vote(
            model,
            images,
            epsilons=epsilons,
            suite=suite,
            names=names,
            seed=seed,
            threat=threat,
            batch_size=batch_size,
            device=device,
            precision=precision,
            cache=cache,
        )
    curve = robustness_curve(
        model,
        images,
        attack=attacks,
        epsilons=epsilons,
        seed=seed,
        threat=threat,
        batch_size=batch_size,
        device=device,
        precision=precision,
        compiled=compiled,
        cache=cache,
        fit_on=fit_on,
    )
    return curve, None


def judge(
    model: nn.Module,
    images: ImageSet,
    curve: RobustnessCurve,
    *,
    attacks: Sequence[Attack],
    panel_images: int = PANEL_IMAGES,
    panel_eps: float | None = None,
    queries: int = 500,
    threat: Threat | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
) -> WorstCase:
    """What is reported of a worst case: all metrics with intervals over patients, and whether to believe it.

    Args:
        curve: of ``model`` on ``images``.
        attacks: that the curve was made with.
        panel_images: the masking panel looks at so many images, spread over patients; 0 leaves it out.
        panel_eps: radius of the panel; None takes that of the threat's norm, 0 leaves it out.
        queries: of Square in the panel.
        threat, seed, batch_size, device, cache: see :func:`utils.evaluation.worst_case.robustness_curve`.
    """
    norm = curve.threat.norm
    radius = CHECK_EPS[norm] if panel_eps is None else check_eps(panel_eps, norm)
    environment, panel = environment_facts(), None
    if panel_images and radius:
        panel = masking_panel(
            model,
            images.balanced_subset(panel_images),
            attacks=attacks,
            queries=queries,
            epsilons=curve.epsilons,
            eps=radius,
            threat=threat,
            seed=seed,
            batch_size=batch_size,
            device=device,
            cache=cache,
        )
    return WorstCase(
        curve=curve,
        interval=[share_interval(curve.robust(step), images.subjects, seed=0) for step in range(len(curve.epsilons))],
        metrics=[report(logits, images, seed=0) for logits in curve.logits],
        answers=_answers(curve, images),
        seed=seed,
        panel=panel,
        environment=environment,
    )


def _answers(curve: RobustnessCurve, images: ImageSet) -> Answers:
    sure, said = curve.logits[0].softmax(1).max(1)
    return Answers(probability=[round(value, 4) for value in sure.tolist()], right=(said == images.labels).tolist())


def record_path(folder: Path, suite: str, threat: Threat, n_images: int | None = None) -> Path:
    """Where the record of an evaluation lies."""
    parts = ["robustness", suite, *([threat.norm] if threat.norm != "linf" else [])]
    parts += [f"untied{threat.size}"] if threat.size else []
    parts += [f"n{n_images}"] if n_images else []
    return folder / f"{'_'.join(parts)}.json"
