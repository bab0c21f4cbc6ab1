"""Fit how a model's scores become probabilities, and where its answer changes, on validation cases."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from utils.data.classes import healthy_class
from utils.evaluation.calibration import Outcomes, log_odds
from utils.evaluation.metrics import best_threshold
from utils.training.pooling import fit_temperature

#: Least slope of the fitted probabilities: answers that order the validation cases wrongly must not be turned around.
_LEAST_SLOPE = 0.01
#: Inverse strength of the penalty on slope and shift; there may be few patients.
_FREEDOM = 10.0


def fit_outcomes(logits: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]) -> Outcomes:
    """Temperature, shift and threshold; nothing is tested yet.

    Where a class is known to mean healthy, the probability of not being so is fitted by logistic regression on its
    log-odds (Platt, 1999); else a temperature of all classes.

    Args:
        logits: N x K of cases that no model was trained on.
        labels: int64 tensor N.

    Raises:
        ValueError: no cases.
    """
    if not len(labels):
        raise ValueError("probabilities are fitted on validation images, and there are none")
    healthy = healthy_class(classes)
    truth = labels != list(classes).index(healthy) if healthy is not None else labels.bool()
    if healthy is None or truth.all() or not truth.any():
        temperature = round(fit_temperature(logits, labels), 4)
        threshold = None if healthy is None else 0.5
        return _fitted(temperature, 0.0, threshold, len(labels))
    from sklearn.linear_model import LogisticRegression  # slow to import

    place = list(classes).index(healthy)
    odds = log_odds(logits, place)
    line = LogisticRegression(C=_FREEDOM).fit(odds[:, None].numpy(), truth.numpy())
    slope = max(float(line.coef_[0, 0]), _LEAST_SLOPE)
    fitted = _fitted(round(1 / slope, 4), round(float(line.intercept_[0]), 4), 0.5, len(labels))
    cut = best_threshold(1 - fitted.chances(logits, place)[:, place], truth)
    return fitted.model_copy(update={"threshold": round(min(max(cut, 1e-3), 1 - 1e-3), 4)})


def _fitted(temperature: float, shift: float, threshold: float | None, count: int) -> Outcomes:
    return Outcomes(temperature=temperature, shift=shift, threshold=threshold, n_fitted=count, tested=[], right={})
