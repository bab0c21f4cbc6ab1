"""Metrics with 95 % intervals from a bootstrap over patients, and comparisons of two models.

Slices of one patient resemble each other, so that images are not independent: whole patients are drawn. All
metrics but AUROC are functions of counts that add up over patients, which makes a thousand draws one product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import scipy
import torch

from utils.core.parts import Part
from utils.data.classes import CLASSES, healthy_class
from utils.data.sets import ImageSet
from utils.data.subject_ids import UNKNOWN
from utils.evaluation.metrics import Levels, Metrics, Scores, merge_by_patient, scores

DRAWS = 1000
_BINS = 15


def patient_groups(subjects: torch.Tensor) -> np.ndarray:
    """Group number 0..P-1 of each image; an image of an unknown patient is a group of its own."""
    own = subjects.clone()
    unknown = own == UNKNOWN
    own[unknown] = int(own.max() if len(own) else 0) + 1 + torch.arange(int(unknown.sum()))
    return np.unique(own.numpy(), return_inverse=True)[1]


def bootstrap_counts(n_groups: int, *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """How often each of ``n_groups`` patients is drawn; the first row draws each once. Shape (1 + draws) x P."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=draws)
    return np.concatenate([np.ones((1, n_groups), dtype=drawn.dtype), drawn]).astype(float)


def interval(values: np.ndarray) -> list[float] | None:
    """Central 95 % of the draws (all but the first entry); None where most of them are undefined."""
    drawn = values[1:][np.isfinite(values[1:])]
    if len(drawn) < 0.5 * (len(values) - 1) or not len(drawn):
        return None
    return [float(bound) for bound in np.quantile(drawn, [0.025, 0.975])]


def scores_over_draws(probabilities: np.ndarray, labels: np.ndarray, groups: np.ndarray, counts: np.ndarray) -> dict:
    """Each metric of :func:`utils.evaluation.metrics.scores` for every row of ``counts``.

    Args:
        probabilities: N x K, rows sum to 1.
        labels: N.
        groups: N, from :func:`patient_groups`.
        counts: D x P, from :func:`bootstrap_counts`.

    Returns:
        name -> D values; NaN where a draw holds none of what is needed.
    """
    k, n_groups = probabilities.shape[1], counts.shape[1]
    confusion = np.zeros((n_groups, k, k))
    np.add.at(confusion, (groups, labels, probabilities.argmax(1)), 1)
    drawn = np.tensordot(counts, confusion, axes=1)
    right, true, said = drawn.diagonal(axis1=1, axis2=2), drawn.sum(2), drawn.sum(1)
    total = true.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        recall = np.where(true > 0, right / true, np.nan)
        f1 = np.where(true > 0, 2 * right / (true + said), np.nan)
        found = {
            "accuracy": right.sum(1) / total,
            "balanced_accuracy": _mean_of_present(recall),
            "macro_f1": _mean_of_present(f1),
            "calibration_error": _calibration_error(probabilities, labels, groups, counts),
        }
    one_class = (true > 0).sum(1) < 2
    areas = np.stack([auroc_over_draws(probabilities[:, c], labels == c, groups, counts) for c in range(k)], axis=1)
    found["auroc"] = np.where(one_class, np.nan, _mean_of_present(np.where(true > 0, areas, np.nan)))
    return found


def _mean_of_present(values: np.ndarray) -> np.ndarray:
    present = np.isfinite(values)
    return np.where(present, values, 0).sum(1) / np.maximum(present.sum(1), 1)


def _calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, groups: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Expected calibration error with equal bins (Guo et al., 2017, equation 3)."""
    sure = probabilities.max(1)
    bins = np.clip((sure * _BINS).astype(int), 0, _BINS - 1)
    gap = np.zeros((counts.shape[1], _BINS))
    np.add.at(gap, (groups, bins), (probabilities.argmax(1) == labels) - sure)
    sizes = counts @ np.bincount(groups, minlength=counts.shape[1])
    return np.abs(counts @ gap).sum(1) / sizes


def auroc_over_draws(score: np.ndarray, positive: np.ndarray, groups: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Area under the curve of one class against the rest for every row of ``counts``; ties count half.

    Args:
        score: N.
        positive: bool N.
        groups, counts: see :func:`scores_over_draws`.

    Returns:
        D values; NaN where a draw holds one kind alone.
    """
    values, rank = np.unique(score, return_inverse=True)
    weights = counts[:, groups]
    wins, losses = (np.zeros((len(counts), len(values))) for _ in range(2))
    for target, mask in ((wins, positive), (losses, ~positive)):
        np.add.at(target.T, rank[mask], weights[:, mask].T)
    below = losses.cumsum(1) - losses / 2
    pairs = wins.sum(1) * losses.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(pairs > 0, (wins * below).sum(1) / pairs, np.nan)


def with_intervals(
    scores: Scores, probabilities: torch.Tensor, labels: torch.Tensor, subjects: torch.Tensor, *, seed: int = 0
) -> Scores:
    """Metrics with their 95 % intervals, name -> [low, high] or None.

    Args:
        scores: from :func:`utils.evaluation.metrics.scores` on the same answers.
        probabilities: N x K, rows sum to 1.
        labels, subjects: int64 tensors N.
    """
    groups = patient_groups(subjects)
    counts = bootstrap_counts(int(groups.max()) + 1, seed=seed)
    drawn = scores_over_draws(probabilities.numpy().astype(float), labels.numpy(), groups, counts)
    return scores.model_copy(update={"interval": {name: interval(values) for name, values in drawn.items()}})


def share_interval(flags: torch.Tensor, subjects: torch.Tensor, *, seed: int = 0) -> list[float] | None:
    """95 % interval of a share of images. ``flags``: bool tensor N."""
    groups = patient_groups(subjects)
    counts = bootstrap_counts(int(groups.max()) + 1, seed=seed)
    hits, sizes = (np.bincount(groups, weights=w, minlength=counts.shape[1]) for w in (flags.numpy(), None))
    return interval((counts @ hits) / (counts @ sizes))


class Comparison(Part):
    """Two models on the same images.

    Attributes:
        difference: first minus second, as a share, with its 95 % ``interval`` over patients.
        only_first, only_second: images that only one of them gets right.
        mcnemar_p: of McNemar's exact test.
    """

    difference: float
    interval: list[float] | None
    only_first: int
    only_second: int
    mcnemar_p: float


def compare(first: torch.Tensor, second: torch.Tensor, subjects: torch.Tensor, *, seed: int = 0) -> Comparison:
    """Two models on the same images: paired difference and McNemar's exact test.

    The test treats images as independent, which slices of one patient are not; the interval draws patients and is
    the one to trust.

    Args:
        first, second: bool tensors N, which images each model gets right (or withstands).
        subjects: int64 tensor N.

    Raises:
        ValueError: not the same images.
    """
    if not len(first) == len(second) == len(subjects):
        raise ValueError(f"{len(first)}, {len(second)} and {len(subjects)} entries cannot be of the same images")
    groups = patient_groups(subjects)
    counts = bootstrap_counts(int(groups.max()) + 1, seed=seed)
    gain = np.bincount(groups, weights=first.double().numpy() - second.double().numpy(), minlength=counts.shape[1])
    drawn = (counts @ gain) / (counts @ np.bincount(groups, minlength=counts.shape[1]))
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    differ = only_first + only_second
    return Comparison(
        difference=float(drawn[0]),
        interval=interval(drawn),
        only_first=only_first,
        only_second=only_second,
        mcnemar_p=float(scipy.stats.binomtest(only_first, differ).pvalue) if differ else 1.0,
    )


class MeanAuroc(Part):
    """Mean over folds of the AUROC, or of a difference of two, with its 95 % ``interval`` over patients."""

    value: float
    interval: list[float] | None


def mean_auroc(chances: Sequence[torch.Tensor], ill: Sequence[torch.Tensor], *, seed: int = 0) -> MeanAuroc | None:
    """How well each fold's model ranks its own patients, on average.

    Answers of different folds come from different models and are never ranked against each other. Patients are drawn
    within their fold, ill and healthy ones apart, so that no draw loses a kind.

    Args:
        chances: of each fold the model's scores of illness, P.
        ill: of each fold, bool P.

    Returns:
        None where a fold holds ill or healthy patients alone.
    """
    drawn = _areas_over_draws([chances], ill, seed)
    return None if drawn is None else MeanAuroc(value=float(drawn[0][0]), interval=interval(drawn[0]))


def compare_auroc(
    first: Sequence[torch.Tensor], second: Sequence[torch.Tensor], ill: Sequence[torch.Tensor], *, seed: int = 0
) -> MeanAuroc | None:
    """Difference of the :func:`mean_auroc` of two models, first minus second; both meet the same patients in each draw.

    Args:
        first, second: of each fold the models' scores of illness, P.
        ill: of each fold, bool P.

    Returns:
        None where a fold holds ill or healthy patients alone.
    """
    drawn = _areas_over_draws([first, second], ill, seed)
    if drawn is None:
        return None
    gain = drawn[0] - drawn[1]
    return MeanAuroc(value=float(gain[0]), interval=interval(gain))


def _areas_over_draws(
    models: Sequence[Sequence[torch.Tensor]], ill: Sequence[torch.Tensor], seed: int
) -> list[np.ndarray] | None:
    """Of each model the mean AUROC over folds in each draw; the first draws every patient once."""
    if any(kinds.all() or not kinds.any() for kinds in ill):
        return None
    rng, areas = np.random.default_rng(seed), []
    for fold, kinds in enumerate(ill):
        counts = np.ones((1 + DRAWS, len(kinds)))
        for kind in (kinds, ~kinds):
            n = int(kind.sum())
            counts[1:, kind.numpy()] = rng.multinomial(n, np.full(n, 1 / n), size=DRAWS)
        asked = (kinds.numpy(), np.arange(len(kinds)), counts)
        areas.append([auroc_over_draws(chances[fold].numpy(), *asked) for chances in models])
    return list(np.mean(areas, axis=0))


def questions(classes: Sequence[str]) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """What may be asked of answers with these classes: name -> names of the (merged) classes, and each class's new one.

    All classes; of the four stages also three, Mild merged with Moderate; and, where one class is known to mean no
    dementia, that one against the rest.

    >>> questions(("CN", "MCI", "AD"))["binary"]
    (('CN', 'the rest'), (0, 1, 1))
    """
    asked = {f"{len(classes)} classes": (tuple(classes), tuple(range(len(classes))))}
    stages = set(classes) == set(CLASSES)
    if stages:
        merged = ("Non", "VeryMild", "Mild or Moderate")
        asked["3 classes"] = (merged, tuple(min(CLASSES.index(name), 2) for name in classes))
    healthy = healthy_class(classes)
    if healthy and len(classes) > 2:
        others = "demented" if stages else "the rest"
        asked["binary"] = ((healthy, others), tuple(int(name != healthy) for name in classes))
    return asked


def binary_caption(metrics: Mapping[str, Levels]) -> str:
    """What the coarsest question of a :func:`report` asks, for tables and figures: ``Non against the rest``."""
    found = metrics.get("binary", next(iter(metrics.values()), None))
    names = list(found.image.recall) if found and found.image else []
    if len(names) != 2 or healthy_class(names) != names[0]:
        return "one class against the rest"
    return f"{names[0]} against the rest"


def merge_classes(probabilities: torch.Tensor, groups: tuple[int, ...]) -> torch.Tensor:
    """Probabilities of merged classes, N x K to N x (1 + max of ``groups``)."""
    merged = torch.zeros(len(probabilities), max(groups) + 1, dtype=probabilities.dtype)
    return merged.index_add_(1, torch.tensor(groups), probabilities)


def report(logits: torch.Tensor, images: ImageSet, *, seed: int = 0) -> Metrics:
    """Every metric with its interval: for all :func:`questions`, by image and by patient.

    Args:
        logits: N x K.

    Returns:
        ``{"4 classes": ..., "3 classes": ..., "binary": ...}``.
    """
    probabilities = logits.softmax(1)
    return {
        name: _levels(probabilities, images, names, groups, seed)
        for name, (names, groups) in questions(images.classes).items()
    }


def _levels(
    probabilities: torch.Tensor, images: ImageSet, names: tuple[str, ...], groups: tuple[int, ...], seed: int
) -> Levels:
    merged = merge_classes(probabilities, groups)
    lookup = torch.tensor(groups)
    means, truth = merge_by_patient(merged, images)

    def scored(chances: torch.Tensor, labels: torch.Tensor, subjects: torch.Tensor) -> Scores | None:
        if not len(labels):
            return None
        return with_intervals(scores(chances, labels, list(names)), chances, labels, subjects, seed=seed)

    return Levels(
        image=scored(merged, lookup[images.labels], images.subjects),
        patient=scored(means, lookup[truth], torch.arange(len(truth))),
    )
