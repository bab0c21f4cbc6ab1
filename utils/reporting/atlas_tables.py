"""Tables of the attack atlas, each made from the record of its chapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from utils.attacks.linked import LINKS
from utils.attacks.targets import target_label
from utils.core.radii import radius_label
from utils.data.sets import protocol_name
from utils.evaluation.robustness import SuiteRecord
from utils.experiments.atlas import names, regions, scans, targets
from utils.experiments.atlas.bench import HARDENED, PLAIN
from utils.experiments.atlas.chapters import ChapterRecord
from utils.experiments.records import display_name
from utils.reporting.atlas_figures import caption, slices_of
from utils.reporting.atlas_findings import learnt, verdict
from utils.reporting.markdown import markdown

#: A chapter's record and what it found.
Chapter = tuple[ChapterRecord, Any]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _share(one: targets.Share) -> str:
    if one.value is None or one.low is None or one.high is None:
        return "-"
    return f"{one.count} of {one.of} [{100 * one.low:.0f}, {100 * one.high:.0f}]"


def _said(record: ChapterRecord, *more: str) -> str:
    """Under each table: on whom, how long, on what."""
    machine = record.environment.get("hardware", "unknown hardware")
    over = "over " if record.resumed else ""
    facts = [caption(record), *more, f"{over}{record.seconds / 60:.0f} minutes on {machine}"]
    return f"\n{'; '.join(filter(None, facts))}.\n"


def names_table(chapter: Chapter) -> str:
    """Every attack alone."""
    record, found = chapter
    rows = [
        [row.title, row.within, *(_percent(row.robust[name]) for name in (PLAIN, HARDENED)), f"{row.seconds:.2f}"]
        for row in _strongest_first(found)
    ]
    clean = [["no attack", "", *(_percent(found.clean[name]) for name in (PLAIN, HARDENED)), ""]]
    one = f"one slice is {100 / found.images:.1f} points"
    said = f"{found.images} test slices, {one}; right without attack and under it, %; seconds a slice; "
    said += f"{' and '.join(names.LEFT_OUT)} take minutes a batch and are left out"
    return markdown(["attack", "radius", PLAIN, HARDENED, "seconds"], clean + rows) + _said(record, said)


def _strongest_first(found: names.NamesFound) -> list[names.NameRow]:
    order = ("linf", "l2", "l0")
    return sorted(found.rows, key=lambda row: (order.index(row.norm), row.robust[HARDENED], row.robust[PLAIN]))


def directions_table(chapter: Chapter) -> str:
    """Illness hidden and invented, by radius."""
    record, found = chapter
    header = ["radius"] + [f"{name}: {side}" for name in found.directions for side in _sides(found)]
    rows = [
        [
            radius_label(eps),
            *(_share(side[step]) for own in found.directions.values() for side in (own.hidden, own.invented)),
        ]
        for step, eps in enumerate(found.radii)
    ]
    said = "of the patients found right without attack those turned, with 95 % intervals (Wilson), %"
    return markdown(header, rows) + _said(record, said)


def _sides(found: targets.TargetsFound) -> tuple[str, str]:
    return f"to {found.whom.healthy}", f"to {found.whom.others}"


def verdicts_table(chapter: Chapter) -> str:
    """Balanced accuracy by patient when the verdict itself is attacked."""
    record, found = chapter
    header = ["model", "no attack", *map(radius_label, found.radii)]
    rows = [[name, *map(_percent, own.balanced)] for name, own in found.directions.items()]
    return markdown(header, rows) + _said(record, f"balanced accuracy by patient, {_asked(found)}, %")


def _asked(found: Any) -> str:
    return f"{found.whom.healthy} against the rest"


def asked_table(chapter: Chapter) -> str:
    """Targets that depend on the slice."""
    record, found = chapter
    words = list(next(iter(found.asked.values())))
    header = ["model", *(targets_label(word) for word in words)]
    rows = [[name, *(_percent(own[word]) for word in words)] for name, own in found.asked.items()]
    right = "; ".join(_by_class(name, table) for name, table in found.reached.items())
    said = "slices that get the wanted answer, of those that have another without attack, %, "
    said += f"{radius_label(targets.EPS)}; right without attack, {right}"
    return markdown(header, rows) + _said(record, said)


def _by_class(name: str, reached: dict[str, dict[str, float | None]]) -> str:
    """Which classes a model knows at all: the diagonal of what an attacker can reach."""
    known = [f"{own} {_percent(table[own])}" for own, table in reached.items()]
    return f"{name}: {', '.join(known)}"


def targets_label(word: str) -> str:
    """A word for a target, for the head of a table."""
    return f"towards {target_label(word)}"


def regions_table(chapter: Chapter) -> str:
    """Attacks inside a part of the slice."""
    record, found = chapter
    parts = list(next(iter(found.regions.values())))
    header = ["part", "share of the pixels"]
    header += [f"{name}, {radius_label(eps)}" for name in found.regions for eps in found.radii[1:4]]
    rows = []
    for part in parts:
        own = [found.regions[name][part] for name in found.regions]
        area = " / ".join(dict.fromkeys(f"{100 * one.area:.0f}" for one in own))
        rows.append([part, area, *(_percent(value) for one in own for value in one.misclassified[1:4])])
    half = "; ".join(
        f"{name}: half of the {len(own.shares)} that change at all need at most "
        f"{_percent(float(np.median(own.shares)))} % of the pixels"
        for name, own in found.sufficient.items()
        if own.shares
    )
    least = _percent(0.5**regions.HALVINGS)
    half += f"; {least} % is the least that is tried"
    said = "correctly classified slices that are misclassified under attack, %; "
    said += f"smallest sufficient regions of one attack at {radius_label(regions.EPS)}: {half}"
    return markdown(header, rows) + _said(record, said)


def universal_table(chapter: Chapter) -> str:
    """One change for all."""
    record, found = chapter
    rows = [
        [name, source, *map(_percent, shares)]
        for name, sources in found.misclassified.items()
        for source, shares in sources.items()
    ]
    said = f"fitted on {found.fitted_on} slices of training patients; "
    said += "correctly classified test slices that it misclassifies, %"
    return markdown(["asked", "change", *map(radius_label, found.radii)], rows) + _said(record, said)


def patients_table(chapter: Chapter) -> str:
    """Verdicts turned within some radii, and the median."""
    record, found = chapter
    shown = [eps for eps in found.radii if round(255 * eps, 6) in (1, 2, 4, 8)]
    rows = []
    for name, links in found.nested().items():
        for link, smallest in links.items():
            reached = np.array([np.inf if radius is None else radius for radius in smallest])
            shares = [_percent(float((reached <= eps + 1e-9).mean())) if len(reached) else "-" for eps in shown]
            rows.append([name, LINKS[link], str(len(reached)), *shares, _median(reached)])
    header = ["model", "changes", "patients right", *map(radius_label, shown), "half are turned within"]
    return markdown(header, rows) + _said(
        record, "verdicts turned, by this kind of change or a narrower one, %; a better attack may turn more"
    )


def _median(reached: np.ndarray) -> str:
    middle = float(np.quantile(reached, 0.5, method="inverted_cdf")) if len(reached) else np.inf
    return radius_label(middle) if np.isfinite(middle) else "none tried"


def survival_table(chapter: Chapter) -> str:
    """What survives each view."""
    record, found = chapter
    views = list(next(iter(found.by_view.values())))
    rows = []
    for name, attacked in found.attacks.items():
        alone = [_percent(found.by_view[name][view]) for view in views]
        rows.append([name, "no attack", "", f"0 of {found.right[name]}", *alone])
        for title, steps in attacked.items():
            for eps, one in zip(found.radii, steps):
                changed = f"{one.misclassified} of {found.right[name]}"
                rows.append(
                    [name, title, radius_label(eps), changed, *(_percent(one.survives[view]) for view in views)]
                )
    said = (
        f"of the misclassified those that still are, over {found.draws} draws a view, %; without attack: of the right"
    )
    return markdown(["model", "attack", "radius", "misclassified", *views], rows) + _said(record, said)


def foreign_table(chapter: Chapter) -> str:
    """Detectors before and after they are attacked."""
    record, found = chapter
    kinds = list(next(iter(next(iter(found.detectors.values())).values())).foreign)
    rows = []
    for name, detectors in found.detectors.items():
        for title, watched in detectors.items():
            told = [
                f"{_percent(own.before.auroc)} ({_percent(own.before.fpr95)}) → {_percent(own.after.auroc)} "
                f"({_percent(own.after.fpr95)})"
                for own in (watched.foreign[kind] for kind in kinds)
            ]
            rows.append([name, title, *told])
    said = (
        "AUROC (in brackets the share of real slices refused where 95 % of the foreign ones are) → both once foreign "
        f"images are attacked within {radius_label(found.foreign_radius)}, %; {found.images} slices and as many "
        "foreign images of each kind"
    )
    return markdown(["model", "detector", *kinds], rows) + _said(record, said)


def fooled_table(chapter: Chapter) -> str:
    """Real slices refused, noticed, and misclassified while accepted."""
    record, found = chapter
    steps = [*map(radius_label, found.radii)]
    rows = [
        [
            name,
            title,
            _percent(own.refused[0]),
            " / ".join(map(_percent, own.refused[1:])),
            " / ".join(map(_percent, own.noticed[1:])),
            " / ".join(map(_percent, own.fooled[1:])),
        ]
        for name, detectors in found.detectors.items()
        for title, own in detectors.items()
    ]
    header = ["model", "detector", "refused", "refused once pushed out", "PGD noticed", "misclassified and accepted"]
    said = f"real slices, %, at {' / '.join(steps)}; a detector accepts 95 % of the validation slices"
    return markdown(header, rows) + _said(record, said)


def scans_table(chapter: Chapter) -> str:
    """Balanced error by patient under each corruption."""
    record, found = chapter
    rows = [["as scanned", *(_percent(found.clean[name].error) for name in (PLAIN, HARDENED)), "", "", "", ""]]
    for kind, own in found.corruptions.items():
        low, high = own.interval or (float("nan"),) * 2
        gap = f"{100 * own.difference:+.1f} [{100 * low:+.0f}, {100 * high:+.0f}]"
        errors = [_percent(own.error[name]) for name in (PLAIN, HARDENED)]
        rows.append([kind, *errors, gap, _ratio(own.relative), _ratio(own.relative_rise), verdict(own)])
    header = ["corruption", PLAIN, HARDENED, "difference", "relative", "relative rise", "hardening"]
    said = (
        f"balanced error by patient, {_asked(found)}, mean over five severities, %; difference in points with its 95 % "
        "interval over patients; relative: hardened over not hardened; relative rise: the same of what is added to the "
        "error as scanned"
    )
    return markdown(header, rows) + _said(record, said)


def severities_table(chapter: Chapter) -> str:
    """Balanced error by patient at each severity."""
    record, found = chapter
    rows = []
    for kind, own in found.corruptions.items():
        pairs = zip(*(own.by_severity[name] for name in (PLAIN, HARDENED)), strict=True)
        rows.append([kind, *(f"{_percent(plain.error)} / {_percent(hard.error)}" for plain, hard in pairs)])
    steps = [f"severity {number}" for number in range(1, len(rows[0]))]
    said = f"balanced error by patient, {_asked(found)}, {PLAIN} / {HARDENED}, %"
    return markdown(["corruption", *steps], rows) + _said(record, said)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def worst_scan_table(chapter: Chapter) -> str:
    """One random scan against the worst of many."""
    record, found = chapter
    rows = [
        [kind, name, _share(own.one), _share(own.worst), _gain(models) if name == HARDENED else ""]
        for kind, models in found.worst.items()
        for name, own in models.items()
    ]
    said = f"severity {found.severity}; of the patients found right those turned, with 95 % intervals (Wilson), %"
    said += "; hardening helps or hurts where the intervals lie apart"
    header = ["scan", "model", "turned by one", f"turned by the worst of {found.draws}", "hardening"]
    return markdown(header, rows) + _said(record, said)


def _gain(models: Mapping[str, scans.Worst]) -> str:
    """Whether the worst scan turns fewer patients with hardening, beyond both intervals."""
    plain, hard = (models[name].worst for name in (PLAIN, HARDENED))
    if plain.low is None or plain.high is None or hard.low is None or hard.high is None:
        return "cannot be told"
    if hard.high < plain.low:
        return "helps"
    return "hurts" if hard.low > plain.high else "cannot be told"


def bracket_table(chapter: Chapter) -> str:
    """Certified and attacked lengths, in short."""
    record, found = chapter
    sure = [one for one in found.patients if one.answer >= 0]
    upper = [one.upper for one in sure if one.upper is not None]
    rows = [
        ["patients", str(len(found.patients))],
        ["certified and right", _percent(found.certified) + " %"],
        ["no certificate", _percent(found.abstained) + " %"],
        ["certified L2 length, median of those certified", _length([one.lower for one in sure])],
        [f"the longest that {found.samples} copies can certify", f"{found.longest:.2f}"],
        ["turned by an attack", f"{len(upper)} of {len(sure)}"],
        ["L2 length of that attack, median of those turned", _length(upper)],
    ]
    said = f"noise of {found.sigma} a pixel, {found.samples} copies, each radius wrong with probability {found.error:g}"
    return markdown(["question", "answer"], rows) + _said(record, said)


def _length(values: Sequence[float]) -> str:
    return f"{float(np.median(values)):.2f}" if len(values) else "-"


def vote_table(record: SuiteRecord) -> str:
    """A vote under each attack alone, then under all, without and with the re-weighted one.

    Raises:
        ValueError: the record is of no vote.
    """
    if record.vote is None:
        raise ValueError(f"{record.title} is no vote, so it has no table of attacks on stand-ins")
    curve, own = record.curve, record.vote
    rows = [[display_name(title), *map(_percent, robust)] for title, robust in own.alone.items()]
    rows.append(["worst case", *map(_percent, curve.robust_accuracy)])
    if own.without_reweighing:
        gained = [before - after for before, after in zip(own.without_reweighing, curve.robust_accuracy)]
        rows.append(["without the re-weighted attack", *map(_percent, own.without_reweighing)])
        rows.append(["lower by it, points", *map(_percent, gained)])
    whom = f"{curve.n_images} test images of {curve.n_subjects} patients"
    whom += f", one slice is {100 / curve.n_images:.4g} points"
    said = f"{record.data.source}, {protocol_name(record.data.plain())}; {own.rule} vote; {whom}; robust accuracy, %"
    return markdown(["attack", "no attack", *(radius_label(eps) for eps in curve.epsilons[1:])], rows) + f"\n{said}.\n"


def costs_table(chapters: Sequence[Chapter]) -> str:
    """How long each chapter took."""
    rows = [
        [record.question, *(f"over {cost}" if record.resumed else cost for cost in _cost(record))]
        for record, _ in chapters
    ]
    machine = chapters[0][0].environment.get("hardware", "unknown hardware")
    return markdown(["chapter", "minutes", "seconds a slice"], rows) + f"\nBoth models, on {machine}.\n"


def _cost(record: ChapterRecord) -> tuple[str, str]:
    """Minutes of a chapter, and its seconds for each slice that it attacked, over both models and all its radii."""
    found, per_patient = record.found, record.facts["budget"]["slices"]
    if "images" in found:
        count = found["images"]
    elif record.facts["section"] == "bracket":
        count = per_patient * len(found["patients"])
    else:
        count = slices_of(record)
    return f"{record.seconds / 60:.1f}", f"{record.seconds / count:.1f}"


ATLAS_TABLES: dict[str, Callable[[Any], str]] = {
    "atlas_names": names_table,
    "atlas_directions": directions_table,
    "atlas_verdicts": verdicts_table,
    "atlas_asked": asked_table,
    "atlas_regions": regions_table,
    "atlas_universal": universal_table,
    "atlas_patients": patients_table,
    "atlas_survival": survival_table,
    "atlas_foreign": foreign_table,
    "atlas_fooled": fooled_table,
    "atlas_scans": scans_table,
    "atlas_severities": severities_table,
    "atlas_worst_scan": worst_scan_table,
    "atlas_bracket": bracket_table,
    "atlas_costs": costs_table,
    "atlas_learnt": learnt,
}
