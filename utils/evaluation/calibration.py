"""How far to believe an answer: probabilities that fit held-out patients, and how such answers turned out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import scipy  # loads its parts at their first use
import torch
from pydantic import Field
from torch import nn

from utils.core.parts import Part, read_part
from utils.core.paths import write_json
from utils.data.classes import healthy_class, severity
from utils.evaluation.gate import calibrating
from utils.evaluation.intervals import patient_groups, share_interval

CALIBRATION = "calibration.json"
#: Answers are put together by tenths of their probability.
BINS = 10
_AGAIN = "run python -m utils calibrate again"


class Outcomes(Part):
    """Answers of one kind of case, a slice or a patient, on patients that nothing was fitted or chosen on.

    Attributes:
        temperature: that the log-odds of not being healthy, or logits where no class is known to mean healthy, are
            divided by (Guo et al., 2017, arXiv:1706.04599); fitted on validation patients.
        shift: added to these log-odds then (Platt, 1999).
        threshold: probability of not being healthy from which that is the answer; chosen on validation patients. None
            where no class is known to mean healthy; then the likeliest class is the answer.
        n_fitted: validation cases.
        tested: for each tenth of that probability [test cases, those of them not healthy]; empty without threshold.
        right: answer -> [test cases with it, those of them that were right].
        bounds: answer -> 95 % interval of that share: of patients, after Wilson (1927), where each case is one; else
            from a bootstrap over patients. Empty in files from before it.
        patients: answer -> how many patients its test cases are of.
    """

    temperature: float
    shift: float
    threshold: float | None
    n_fitted: int
    tested: list[list[int]]
    right: dict[str, list[int]]
    bounds: dict[str, list[float]] = Field(default_factory=dict)
    patients: dict[str, int] = Field(default_factory=dict)

    @property
    def cut(self) -> float:
        """The model's own log-odds at the threshold."""
        threshold = 0.5 if self.threshold is None else self.threshold
        return (math.log(threshold / (1 - threshold)) - self.shift) * self.temperature

    def chances(self, logits: torch.Tensor, healthy: int | None) -> torch.Tensor:
        """Calibrated probabilities N x K.

        Among the classes that are not healthy, the model's own shares are kept.

        Args:
            logits: N x K, or log-probabilities.
            healthy: index of the class that means so, or None.
        """
        if healthy is None:
            return (logits / self.temperature).softmax(-1)
        own = logits.softmax(-1)
        ill = (log_odds(logits, healthy) / self.temperature + self.shift).sigmoid()
        others = own.clone()
        others[:, healthy] = 0
        spread = ill[:, None] * others / others.sum(1, keepdim=True).clamp(min=1e-12)
        spread[:, healthy] = 1 - ill
        return spread


class Calibration(Part):
    """What is known of a model's answers.

    Attributes:
        classes: in label order.
        fingerprint: of the data.
        weights_sha256: of each model that answers, so that no other one's answers are told by these.
        source, note: of the data, and what must be said of it.
        patient: None where a set names no patients.
    """

    classes: list[str]
    fingerprint: str
    weights_sha256: dict[str, str]
    source: str
    note: str
    slice: Outcomes
    patient: Outcomes | None

    def of(self, whole: bool) -> Outcomes:
        """Of patients where a case is one and such answers were measured, else of slices."""
        return self.patient if whole and self.patient else self.slice

    def save(self, folder: Path) -> None:
        """Write ``calibration.json``."""
        write_json(Path(folder) / CALIBRATION, self.plain())

    @classmethod
    def load(cls, folder: Path, weights_sha256: dict[str, str]) -> Calibration:
        """Read what :meth:`save` wrote, for the models of these weights.

        Raises:
            FileNotFoundError: it does not exist; the message says how it is made.
            ValueError: it is damaged, or of other weights.
        """
        path = Path(folder) / CALIBRATION
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist, so nothing is known of how right this model's answers are: run "
                f"{calibrating(Path(folder))} first"
            )
        found = read_part(cls, path, _AGAIN)
        if found.weights_sha256 != weights_sha256:
            raise ValueError(f"{path} is of other weights than those beside it; {_AGAIN}")
        return found


def log_odds(logits: torch.Tensor, healthy: int) -> torch.Tensor:
    """Log-odds of not being healthy, N, of logits N x K."""
    others = [place for place in range(logits.shape[-1]) if place != healthy]
    return logits[:, others].logsumexp(-1) - logits[:, healthy]


class Decision(nn.Module):
    """A model of K classes as one of two, healthy and not.

    Args:
        model: gives logits or log-probabilities N x K.
        healthy: index of the class that means healthy.
        cut: log-odds of not being healthy from which that is the answer.
    """

    cut: torch.Tensor

    def __init__(self, model: nn.Module, healthy: int, cut: float) -> None:
        super().__init__()
        self.model, self.healthy = model, healthy
        self.register_buffer("cut", torch.tensor(float(cut)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits N x 2 of healthy and not, 0 for healthy, so that the larger one is the answer."""
        odds = log_odds(self.model(images), self.healthy)
        return torch.stack([torch.zeros_like(odds), odds - self.cut], dim=1)


def question(classes: Sequence[str]) -> tuple[str, str] | None:
    """The two answers, healthy first; None where no class is known to mean healthy.

    >>> question(("Non", "Mild")), question(("CN", "MCI", "AD")), question(("cat", "dog"))
    (('no dementia', 'dementia'), ('no impairment', 'impairment'), None)
    """
    healthy = healthy_class(classes)
    if healthy is None:
        return None
    demented = severity("verymild")
    ranks = [severity(name) for name in classes if name != healthy]
    mild = any(rank is None or demented is None or rank < demented for rank in ranks)
    word = "impairment" if mild else "dementia"
    return f"no {word}", word


def with_outcomes(
    fitted: Outcomes,
    logits: torch.Tensor,
    labels: torch.Tensor,
    classes: Sequence[str],
    subjects: torch.Tensor | None = None,
) -> Outcomes:
    """What was fitted, with how such answers turned out on test cases.

    Args:
        logits: N x K of test cases.
        labels: int64 tensor N.
        subjects: whose each case is, int64 N; None says that each is a patient's of its own.
    """
    whose = torch.arange(len(labels)) if subjects is None else subjects
    asked, healthy = question(classes), healthy_class(classes)
    if asked is None or healthy is None or fitted.threshold is None:
        said = logits.argmax(1)
        by_answer = {name: (said == place, labels == place) for place, name in enumerate(classes)}
        return fitted.model_copy(update={"tested": [], **_turned_out(by_answer, whose)})
    place = list(classes).index(healthy)
    ill, truth = 1 - fitted.chances(logits, place)[:, place], labels != place
    tenth = (ill * BINS).long().clamp(max=BINS - 1)
    answered = log_odds(logits, place) >= fitted.cut
    turned_out = _turned_out({asked[0]: (~answered, ~truth), asked[1]: (answered, truth)}, whose)
    return fitted.model_copy(update={"tested": [_counts(tenth == n, truth) for n in range(BINS)], **turned_out})


def _turned_out(
    by_answer: Mapping[str, tuple[torch.Tensor, torch.Tensor]], subjects: torch.Tensor
) -> dict[str, dict[str, Any]]:
    """``right``, ``bounds`` and ``patients`` of :class:`Outcomes`: answer -> who got it, and for whom it is right."""
    bounds = {name: _bounds(true[chosen], subjects[chosen]) for name, (chosen, true) in by_answer.items()}
    return {
        "right": {name: _counts(chosen, true) for name, (chosen, true) in by_answer.items()},
        "bounds": {name: own for name, own in bounds.items() if own},
        "patients": {name: len(set(patient_groups(subjects[chosen]))) for name, (chosen, _) in by_answer.items()},
    }


def _bounds(right: torch.Tensor, subjects: torch.Tensor) -> list[float] | None:
    """95 % interval of the share that is right; slices of one patient are drawn together."""
    if not len(right):
        return None
    if len(subjects.unique()) < len(subjects):
        return share_interval(right, subjects)
    found = scipy.stats.binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return [float(found.low), float(found.high)]


def _counts(chosen: torch.Tensor, true: torch.Tensor) -> list[int]:
    return [int(chosen.sum()), int((chosen & true).sum())]
