"""Robustness of a trained model with everything that a reader needs to believe it, as one JSON file.

    python -m utils robustness --model ResNet34 --data dataset/dataset_variables --suite standard

The worst case of each image over a suite of attacks at growing radii, all metrics with intervals over patients,
and the gradient checks. A killed run goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.attacks.attack import Attack
from utils.attacks.suites import Threat, check_suite
from utils.core.radii import CHECK_EPS, GRIDS, check_eps
from utils.core.reproducibility import environment_facts
from utils.data.sets import ImageSet
from utils.evaluation.curve import NEVER, RobustnessCurve
from utils.evaluation.ensemble import Vote
from utils.evaluation.intervals import report, share_interval
from utils.evaluation.masking import masking_panel
from utils.evaluation.vote import attack_vote
from utils.evaluation.worst_case import robustness_curve

PANEL_IMAGES = 128


def evaluate_robustness(
    model: nn.Module,
    images: ImageSet,
    *,
    suite: str = "standard",
    epsilons: Sequence[float] | None = None,
    names: Sequence[str] = (),
    threat: Threat | None = None,
    panel: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    compiled: bool = False,
    cache: Path | None = None,
) -> dict[str, Any]:
    """The whole protocol on one model or vote.

    Args:
        suite: a key of :data:`utils.attacks.suites.SUITES`.
        epsilons: radii; 0 is added. None takes the grid of the threat's norm.
        names: of a vote's members.
        panel: ``panel_images``, ``panel_eps``, ``queries`` of :func:`judge`.
        precision, compiled: of the attacks; the panel's are always made in float32 by the model as it is.
        cache: folder for finished batches.
        images, threat, seed, batch_size, device: see :func:`utils.evaluation.worst_case.robustness_curve`.

    Returns:
        what :func:`judge` returns, and ``suite``, ``precision``, ``compiled``, and ``vote`` for a vote (see
        :func:`utils.evaluation.vote.attack_vote`).

    Raises:
        ValueError: an unknown suite, a vote to be compiled; also see
            :func:`utils.evaluation.worst_case.robustness_curve`.
    """
    attacks = check_suite(suite)
    epsilons = GRIDS[(threat or Threat()).norm] if epsilons is None else epsilons
    options = {"threat": threat, "seed": seed, "batch_size": batch_size, "device": device, "cache": cache}
    record: dict[str, Any] = {"suite": suite, "precision": precision, "compiled": compiled}
    own = options | {"precision": precision}
    if not isinstance(model, Vote):
        curve = robustness_curve(model, images, attack=attacks, epsilons=epsilons, compiled=compiled, **own)
    elif compiled:
        raise ValueError("a vote is attacked through many models, each of which would be compiled: leave --compile out")
    else:
        curve, record["vote"] = attack_vote(model, images, epsilons=epsilons, suite=suite, names=names, **own)
    return record | judge(model, images, curve, attacks=attacks, **(panel or {}), **options)


def judge(
    model: nn.Module,
    images: ImageSet,
    curve: RobustnessCurve,
    *,
    attacks: Sequence[Attack],
    panel_images: int = PANEL_IMAGES,
    panel_eps: float | None = None,
    queries: int = 500,
    **options: Any,
) -> dict[str, Any]:
    """What is reported of a worst case: all metrics with intervals over patients, and whether to believe it.

    Args:
        curve: of ``model`` on ``images``.
        attacks: that the curve was made with.
        panel_images: the masking panel looks at so many images, spread over patients; 0 leaves it out.
        panel_eps: radius of the panel; None takes that of the threat's norm, 0 leaves it out.
        queries: of Square in the panel.
        options: ``threat``, ``seed``, ``batch_size``, ``device``, ``cache`` of
            :func:`utils.evaluation.worst_case.robustness_curve`.

    Returns:
        plain values: ``curve``; ``interval`` of robust accuracy by radius; ``metrics`` by radius (see
        :func:`utils.evaluation.intervals.report`); ``answers`` without attack; ``seed``; ``environment``;
        ``panel``, or None.
    """
    record = {**summarise(curve, images), "seed": options.get("seed", 0), "panel": None}
    norm = curve.threat["norm"]
    panel_eps = CHECK_EPS[norm] if panel_eps is None else check_eps(panel_eps, norm)
    record["environment"] = environment_facts()  # a model may be attacked elsewhere and later than it was trained
    if panel_images and panel_eps:
        few = images.balanced_subset(panel_images)
        radii = {"epsilons": curve.epsilons, "eps": panel_eps}
        record["panel"] = masking_panel(model, few, attacks=attacks, queries=queries, **radii, **options).as_dict()
    return record


def summarise(curve: RobustnessCurve, images: ImageSet, *, seed: int = 0) -> dict[str, Any]:
    """A curve as plain values, with intervals over patients, all metrics at each radius, and each clean answer."""
    first = torch.tensor(curve.first_broken)
    sure, said = curve.logits[0].softmax(1).max(1)
    standing = [(first == NEVER) | (first > step) for step in range(len(curve.epsilons))]
    return {
        "curve": curve.as_dict(),
        "interval": [share_interval(flags, images.subjects, seed=seed) for flags in standing],
        "metrics": [report(logits, images, seed=seed) for logits in curve.logits],
        "answers": {
            "probability": [round(value, 4) for value in sure.tolist()],
            "right": (said == images.labels).tolist(),
        },
    }


def record_path(folder: Path, suite: str, threat: Threat, n_images: int | None = None) -> Path:
    """Where the record of an evaluation lies."""
    parts = ["robustness", suite, *([threat.norm] if threat.norm != "linf" else [])]
    parts += [f"untied{threat.size}"] if threat.size else []
    parts += [f"n{n_images}"] if n_images else []
    return folder / f"{'_'.join(parts)}.json"
