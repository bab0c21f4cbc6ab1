"""What an attack made on one model does to another, and what a wrong step size does to an attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from utils.attacks.attack import Attack
from utils.data.sets import ImageSet
from utils.evaluation.worst_case import robustness_curve


def transfer_matrix(
    models: Mapping[str, nn.Module], images: ImageSet, *, eps: float, attack: Attack | None = None, **options: Any
) -> dict[str, dict[str, float]]:
    """Accuracy of each model on images that were made to fool each other one.

    Args:
        models: name -> model.
        eps: radius.
        attack: None is PGD-20.
        options: ``threat``, ``seed``, ``batch_size``, ``device``, ``cache`` of
            :func:`utils.evaluation.worst_case.robustness_curve`.

    Returns:
        source -> target -> accuracy 0..1. On the diagonal a model is attacked through its own gradient.
    """
    attack = replace(attack or Attack(), stop_when_fooled=False)
    found: dict[str, dict[str, float]] = {}
    for source in models:
        found[source] = {}
        for target, model in models.items():
            made = replace(attack, surrogate="" if source == target else source)
            curve = robustness_curve(
                model, images, attack=made, epsilons=[eps], surrogates={source: models[source]}, **options
            )
            found[source][target] = curve.robust_accuracy[-1]
    return found


def step_size_sweep(
    model: nn.Module, images: ImageSet, *, eps: float, steps: int, alphas: Sequence[float], **options: Any
) -> dict[str, Any]:
    """Accuracy under PGD of a fixed number of steps from the image itself, for several step sizes.

    Without a random start, as attacks are often written: ``alpha * steps`` below ``eps`` then leaves most of the
    ball unseen, and the model looks robust.

    Returns:
        plain values for :func:`utils.reporting.robustness_plots.plot_step_sizes`: ``alphas``, ``accuracy``, ``eps``,
        ``steps``, ``clean``, ``n_images``, ``n_subjects``.
    """
    curves = [
        robustness_curve(
            model, images, attack=Attack("pgd", steps=steps, alpha=alpha, random_start=False), epsilons=[eps], **options
        )
        for alpha in alphas
    ]
    return {
        "alphas": list(alphas),
        "accuracy": [curve.robust_accuracy[-1] for curve in curves],
        "eps": eps,
        "steps": steps,
        "clean": curves[0].robust_accuracy[0],
        "n_images": curves[0].n_images,
        "n_subjects": curves[0].n_subjects,
    }
