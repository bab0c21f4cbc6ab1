"""What a notebook found, in sentences that are computed from the scores beside which they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from utils.core.radii import radius_label
from utils.data.sets import ImageSet
from utils.evaluation.intervals import binary_caption, compare
from utils.evaluation.leak_audit import LeakAudit
from utils.evaluation.metrics import Metrics, Scores
from utils.evaluation.robustness import SuiteRecord
from utils.experiments.records import display_name
from utils.reporting.robustness_figures import verdict


def training_findings(title: str, answers: Metrics, baselines: Mapping[str, Metrics], note: str = "") -> list[str]:
    """What a trained model knows, beside what can be known without a network.

    Args:
        title: folder name of the model.
        answers: :func:`utils.evaluation.intervals.report` of its answers to images without attack.
        baselines: name -> the same of each baseline, on the same images.
        note: what must be said of the data first.

    Raises:
        ValueError: no baseline to compare with.
    """
    if not baselines:
        raise ValueError("a finding needs a baseline beside it; give those of baseline_answers")
    said = [note] if note else []
    own = _image_scores(answers)
    if own is None:
        return [*said, f"{display_name(title)} was tested on no image."]
    rival, best = _best(baselines)
    said.append(
        f"{display_name(title)} is right on {_percent(own.accuracy)} of {own.n} test images; without a network, "
        f"{rival} is right on {_percent(best.accuracy)}."
    )
    said += _against(answers, baselines)
    known = {name: share for name, share in own.recall.items() if share is not None}
    if known:
        least = min(known, key=known.__getitem__)
        said.append(f"Of the classes it finds {least} least often: recall {100 * known[least]:.1f} %.")
    return said


def robustness_findings(
    records: Mapping[str, SuiteRecord],
    baselines: Mapping[str, Metrics],
    eps: float,
    note: str = "",
    images: ImageSet | None = None,
) -> list[str]:
    """What attacks leave of some models, whether one of them keeps more than all others, and whether to believe it.

    One is said to keep more than another only where the 95 % interval over patients of their difference on the same
    images lies above 0, and to be above a baseline, or a model attacked on other images, where their intervals lie
    apart.

    Args:
        records: title -> worst case, see :func:`utils.reporting.robustness_figures.worst_cases`.
        baselines: name -> metrics on images without attack, see :func:`training_findings`.
        eps: radius to tell of, pixels in [0, 1]; where it was not measured, the nearest that all models share.
        note: what must be said of the data first.
        images: that the models were attacked on; without them no two models are told apart in pairs.

    Raises:
        ValueError: no model, no baseline, or no radius that all models were measured at.
    """
    if not records or not baselines:
        raise ValueError("a finding needs a model that was attacked and a baseline beside it; one of them is missing")
    eps = _nearest(records, eps)
    most_images = max(record.curve.n_images for record in records.values())
    shown = "; ".join(
        f"{display_name(title)} {100 * record.curve.at(0):.1f} → {100 * record.curve.at(eps):.1f}"
        + (f" on {record.curve.n_images} of them" if record.curve.n_images < most_images else "")
        for title, record in records.items()
    )
    rival, best = _best(baselines)
    theirs = best.interval.get("accuracy")
    above = [display_name(title) for title, record in records.items() if _apart(_bounds(record, 0), theirs)]
    # a hardened model's name holds a comma
    names = (" and " if len(above) < 3 else "; ").join(above) or "none of them"
    checks = "; ".join(f"{display_name(title)} {verdict(record)}" for title, record in records.items())
    return [
        *([note] if note else []),
        f"From no attack to the worst case within {radius_label(eps)}, {_most(records, eps, images)} (right answers in "
        f"% of the test images: {shown}).",
        f"Without a network, {rival} is right on {_percent(best.accuracy)}; without attack, shown to be above that: "
        f"{names}.",
        f"Gradient checks that were passed, so that a number is not owed to hidden gradients: {checks}.",
    ]


def _most(records: Mapping[str, SuiteRecord], eps: float, images: ImageSet | None) -> str:
    """Which model keeps more than every other, if one is shown to."""
    if len(records) == 1:
        return "this is what is left"
    kept = {title: record.curve.at(eps) for title, record in records.items()}
    first = max(kept, key=kept.__getitem__)
    others = [record for title, record in records.items() if title != first]
    if all(_keeps_more(records[first], other, eps, images) for other in others):
        return f"{display_name(first)} keeps most"
    return "no model is shown to keep more than all others"


def _keeps_more(one: SuiteRecord, other: SuiteRecord, eps: float, images: ImageSet | None) -> bool:
    """Whether chance does not explain that one model keeps more than another."""
    if images is None or not one.curve.n_images == other.curve.n_images == len(images):
        return _apart(_bounds(one, eps), _bounds(other, eps))
    mine, theirs = (record.curve.robust(record.curve.epsilons.index(eps)) for record in (one, other))
    found = compare(mine, theirs, images.subjects).interval
    return found is not None and found[0] > 0


def _bounds(record: SuiteRecord, eps: float) -> list[float] | None:
    """The interval of robust accuracy at a measured radius."""
    return record.interval[record.curve.epsilons.index(eps)]


def _apart(high: list[float] | None, low: list[float] | None) -> bool:
    """Whether one interval lies above another; not where either is unknown."""
    return high is not None and low is not None and high[0] > low[1]


def _nearest(records: Mapping[str, SuiteRecord], eps: float) -> float:
    """Of the radii at which all models were attacked, the one next to ``eps``."""
    shared = set.intersection(*(set(record.curve.epsilons) for record in records.values())) - {0.0}
    if not shared:
        raise ValueError(f"{', '.join(records)} have no radius in common; attack them at the same ones")
    return min(shared, key=lambda radius: (abs(radius - eps), radius))


def _against(answers: Metrics, baselines: Mapping[str, Metrics]) -> list[str]:
    """By patient, and whether the intervals tell model and best baseline apart; nothing where AUROC is undefined."""
    own = _patient_scores(answers)
    known = {name: scores for name, metrics in baselines.items() if (scores := _patient_scores(metrics))}
    areas = {name: (scores.auroc, scores.interval.get("auroc")) for name, scores in known.items()}
    ranked = {name: (area, bounds) for name, (area, bounds) in areas.items() if area is not None}
    if own is None or own.auroc is None or not ranked:
        return []
    rival, (best, theirs) = max(ranked.items(), key=lambda entry: entry[1][0])
    mine = own.interval.get("auroc")
    told = "no difference is shown"
    if _apart(mine, theirs):
        told = "the network is better"
    if _apart(theirs, mine):
        told = "the network is worse"
    return [
        f"By patient ({own.n}), {binary_caption(answers)}, its AUROC is {_percent(own.auroc)}; that of {rival} is "
        f"{_percent(best)}: {told}."
    ]


def leak_findings(audits: Sequence[LeakAudit], note: str = "") -> list[str]:
    """How much of a score on each split is owed to patients who are on both of its sides.

    Args:
        audits: of splits of the same images.
        note: what must be said of the data first.

    Raises:
        ValueError: no audit.
    """
    if not audits:
        raise ValueError("nothing was audited; give the audits of uf.audit")
    said = [note] if note else []
    for one in audits:
        alone = "" if one.expected is None else f"; the classes alone give {_percent(one.expected)}"
        found = "" if one.same_patient is None else f". It is of the same patient for {_percent(one.same_patient)}"
        said.append(
            f"On the {one.protocol} split the nearest training image, which learns nothing, is right on "
            f"{_percent(one.accuracy)} of {one.n_test} test images{alone}{found}."
        )
    high, low = (choose(audits, key=lambda one: one.accuracy) for choose in (max, min))
    if high.accuracy > low.accuracy:
        said.append(
            f"So {100 * (high.accuracy - low.accuracy):.1f} points of a score on the {high.protocol} split need no "
            f"knowledge of the disease that the {low.protocol} split asks for."
        )
    return said


def _image_scores(metrics: Metrics) -> Scores | None:
    """Of all classes, over images."""
    return next(iter(metrics.values())).image


def _patient_scores(metrics: Metrics) -> Scores | None:
    """Of the coarsest question, over patients."""
    return list(metrics.values())[-1].patient


def _best(baselines: Mapping[str, Metrics]) -> tuple[str, Scores]:
    """The baseline with the most right answers to images."""
    known = {name: scores for name, metrics in baselines.items() if (scores := _image_scores(metrics))}
    name = max(known, key=lambda name: known[name].accuracy)
    return name, known[name]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
