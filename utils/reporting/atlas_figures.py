"""Figures of the attack atlas, each drawn from the record of its chapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.attacks.linked import LINKS
from utils.core.radii import grey_levels, radius_label
from utils.core.reproducibility import generator
from utils.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt_slices
from utils.data.sets import protocol_name
from utils.experiments.atlas import bracket, foreign, names, patients, regions, scans, survival, targets, universal
from utils.experiments.atlas.bench import HARDENED, PLAIN
from utils.experiments.atlas.chapters import CHAPTERS, ChapterRecord, chapter_path, read_chapter
from utils.reporting.style import COLOURS, axes_of, finish, legend_of_curves, line_style, percent_axis, save_figure

#: Colour of each model in every figure.
HUES = {PLAIN: COLOURS[0], HARDENED: COLOURS[1]}
_MARKS = {PLAIN: "o", HARDENED: "s"}
#: Chapters that take :meth:`utils.experiments.atlas.bench.Bench.few` slices.
_OF_FEW_SLICES = ("regions", "survival", "foreign")


def caption(record: ChapterRecord) -> str:
    """On whom a chapter was measured, and what must be said of its numbers."""
    data = f"{record.data.source}, {protocol_name(record.data.plain())}"
    whose = _whose(record) if "whom" in record.found else ""
    norm = "radii in L∞" if "radii" in record.found else ""
    return "; ".join(filter(None, [data, whose, norm, record.note]))


def _whose(record: ChapterRecord) -> str:
    """How many patients and slices a chapter took of those that the atlas has."""
    whom = record.found["whom"]
    if record.facts["section"] == "bracket":
        return f"{len(record.found['patients'])} test patients"
    return f"{whom['patients']} test patients, {slices_of(record)} slices"


def slices_of(record: ChapterRecord) -> int:
    """How many slices a chapter took."""
    slices, images = record.found["whom"]["slices"], record.facts["budget"]["images"]
    return min(slices, images) if record.facts["section"] in _OF_FEW_SLICES else slices


def _shares_by_radius(ax: Axes, levels: Sequence[float]) -> None:
    """Percent over radii, which double from tick to tick."""
    ax.set(xscale="log", xlabel="eps (/255, L-infinity)")
    ax.set_xticks(levels, [f"{level:g}" for level in levels])
    ax.minorticks_off()
    percent_axis(ax)


def plot_names(found: names.NamesFound, note: str = "") -> Figure:
    """What each attack leaves, strongest on top; a panel for each norm."""
    norms = [norm for norm in ("linf", "l2", "l0") if any(row.norm == norm for row in found.rows)]
    rows = {norm: [row for row in found.rows if row.norm == norm] for norm in norms}
    heights = [len(rows[norm]) + 1.5 for norm in norms]
    figure, axes = axes_of(len(norms), 1, size=(8.4, 0.24 * sum(heights) + 1.2), height_ratios=heights, sharex=True)
    for ax, norm in zip(axes[:, 0], norms):
        ordered = sorted(rows[norm], key=lambda row: -row.robust[HARDENED])
        for name, hue in HUES.items():
            shown = [100 * row.robust[name] for row in ordered]
            # the first is larger, so that it shows behind an equal second
            size = 7 if name == PLAIN else 4
            ax.plot(shown, range(len(ordered)), _MARKS[name], color=hue, label=name, markersize=size)
            ax.axvline(100 * found.clean[name], color=hue, linestyle=":", linewidth=1)
        ax.set_yticks(range(len(ordered)), [row.title for row in ordered], fontsize=8)
        ax.set_title(f"within {ordered[0].within}", fontsize=9, loc="left")
        ax.set_ylim(-0.6, len(ordered) - 0.4)
    axes[-1, 0].set(xlabel="right without attack and under it (%)", xlim=(-2, 102))
    axes[0, 0].plot([], [], ":", color="grey", linewidth=1, label="without attack")
    axes[0, 0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=8)
    return finish(figure, "What each attack alone leaves", f"{found.images} test slices; {note}".strip("; "))


def plot_directions(found: targets.TargetsFound, note: str = "") -> Figure:
    """Illness hidden and illness invented, by radius, with Wilson's intervals."""
    figure, axes = axes_of(1, 2, size=(9, 3.8), sharey=True)
    levels = grey_levels(found.radii)
    whom = found.whom
    sides = {"hidden": f"{whom.others} turned to {whom.healthy}", "invented": f"{whom.healthy} turned to {whom.others}"}
    for ax, (side, title) in zip(axes[0], sides.items()):
        for name, direction in found.directions.items():
            shares = getattr(direction, side)
            value, low, high = (100 * np.array(part, dtype=float) for part in _bounds(shares))
            style = {"color": HUES[name], "marker": _MARKS[name], "capsize": 3, "clip_on": False}
            # a little beside each other, so that equal shares do not hide each other
            beside = np.array(levels) * (0.97 if name == PLAIN else 1.03)
            label = f"{name} (of {shares[0].of} found right)"
            ax.errorbar(beside, value, yerr=[value - low, high - value], label=label, **style)
        ax.set_title(title)
        _shares_by_radius(ax, levels)
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    axes[0, 0].set_ylabel("share of patients (%)")
    each = found.whom.slices // max(found.whom.patients, 1)
    said = f"{each} slices of each patient attacked together, its verdict is the target; bars: 95 %, Wilson"
    return finish(figure, "Which way an attack turns patients", said, note)


def _bounds(shares: list[targets.Share]) -> tuple[list, list, list]:
    return [one.value for one in shares], [one.low for one in shares], [one.high for one in shares]


def plot_reached(found: targets.TargetsFound, note: str = "") -> Figure:
    """How often a slice of each class gets the answer that the attacker wants."""
    figure, axes = axes_of(1, 2, size=(9, 4))
    for ax, (name, table) in zip(axes[0], found.reached.items()):
        classes = list(table)
        shares = np.array([[table[own][wanted] for wanted in classes] for own in classes], dtype=float)
        picture = ax.imshow(100 * shares, vmin=0, vmax=100, cmap="cividis")
        for row, column in np.ndindex(shares.shape):
            if np.isfinite(shares[row, column]):
                dark = shares[row, column] < 0.6
                text = f"{100 * shares[row, column]:.0f}"
                ax.text(column, row, text, ha="center", va="center", color="white" if dark else "black", fontsize=9)
            else:
                ax.text(column, row, "none had\nanother", ha="center", va="center", fontsize=7)
        ax.set_xticks(range(len(classes)), classes)
        ax.set_yticks(range(len(classes)), classes)
        ax.set(xlabel="wanted answer", ylabel="true class", title=name)
        ax.grid(False)
    label = "slices that get the wanted answer,\nof those that had another (%)"
    figure.colorbar(picture, ax=list(axes[0]), label=label, shrink=0.8)
    diagonal = "on the diagonal: right without attack"
    return finish(figure, f"Targeted attacks within {radius_label(targets.EPS)}", diagonal, note)


def plot_regions(found: regions.RegionsFound, note: str = "") -> Figure:
    """What an attack inside a part of the slice is worth beside one on the whole image."""
    parts = list(next(iter(found.regions.values())))
    figure, axes = axes_of(1, 2, size=(9.6, 4.2), sharey=True)
    levels = grey_levels(found.radii)
    for ax, (name, own) in zip(axes[0], found.regions.items()):
        for number, part in enumerate(parts):
            label = f"{part} ({100 * own[part].area:.0f} % of the pixels)"
            ax.plot(levels, [100 * share for share in own[part].misclassified], label=label, **line_style(number))
        ax.set_title(name)
        _shares_by_radius(ax, levels)
    axes[0, 0].set_ylabel("correctly classified slices\nthat are misclassified under attack (%)")
    legend_of_curves(axes[0, 1])
    return finish(figure, "PGD that may change only a part of the slice", note)


def plot_sufficient(found: regions.RegionsFound, note: str = "") -> Figure:
    """Where the smallest regions that alone change an answer lie."""
    figure, axes = axes_of(1, 2, size=(8.4, 4))
    top = max(0.01, *(np.max(own.seen) for own in found.sufficient.values()))
    for ax, (name, own) in zip(axes[0], found.sufficient.items()):
        picture = ax.imshow(100 * np.array(own.seen), vmin=0, vmax=100 * top, cmap="cividis")
        ax.axis("off")
        half = ""
        if own.shares:
            half = f"half need at most {100 * float(np.median(own.shares)):.1f} % of the pixels"
            # records keep four digits
            at_least = np.median(own.shares) <= round(0.5**regions.HALVINGS, 4)
            half += ",\nthe least share that is tried" if at_least else ""
        changed = f"{len(own.shares)} slices changed, {own.unchanged} not"
        ax.set_title("\n".join(filter(None, [name, changed, half])), fontsize=9)
    figure.colorbar(picture, ax=list(axes[0]), label="slices whose region has the place (%)", shrink=0.8)
    title = f"Smallest regions that alone change an answer, within {radius_label(regions.EPS)}"
    return finish(figure, title, "pixels ranked by what they add to the loss of one attack on the whole slice", note)


def plot_universal(found: universal.UniversalFound, note: str = "") -> Figure:
    """One change for everybody: how it looks, and whom it fools."""
    figure, axes = axes_of(2, 2, size=(9, 7), height_ratios=(1.2, 1))
    top = grey_levels(found.radii)[-1]
    for ax, (name, change) in zip(axes[0], found.change.items()):
        picture = ax.imshow(change.levels(), vmin=-top, vmax=top, cmap="PuOr")
        ax.set_title(f"fitted on the model that is {name}", fontsize=9)
        ax.axis("off")
    figure.colorbar(picture, ax=list(axes[0]), label="grey levels of 255", shrink=0.8)
    levels = grey_levels(found.radii)
    for ax, (name, sources) in zip(axes[1], found.misclassified.items()):
        for number, (source, shares) in enumerate(sources.items()):
            ax.plot(levels, [100 * share for share in shares], label=source, **line_style(number))
        ax.set(xlabel="eps (/255, L-infinity)", title=f"asked: {name}", xticks=levels)
        percent_axis(ax)
    axes[1, 0].set_ylabel("correctly classified slices\nthat it misclassifies (%)")
    axes[1, 1].legend(fontsize=8, title="change", title_fontsize=8)
    fitted = f"fitted on {found.fitted_on} slices of training patients"
    return finish(figure, "One change for all slices of all patients", fitted, note)


def plot_patients(found: patients.PatientsFound, note: str = "") -> Figure:
    """Share of patients whose verdict is turned within each radius, by how their slices are tied."""
    figure, axes = axes_of(1, 2, size=(9.6, 3.8), sharey=True)
    levels = grey_levels(found.radii)
    for ax, (name, links) in zip(axes[0], found.nested().items()):
        count = 0
        for number, (link, smallest) in enumerate(links.items()):
            reached = np.array(grey_levels(np.inf if radius is None else radius for radius in smallest))
            count = len(reached)
            shares = [100 * float((reached <= level + 1e-9).mean()) if count else 0.0 for level in levels]
            ax.plot(levels, shares, label=LINKS[link], **line_style(number))
        ax.set_title(f"{name} ({count} right without attack)")
        _shares_by_radius(ax, [0.25, 0.5, 1, 2, 4, 8, 16])
    axes[0, 0].set_ylabel("verdicts turned (%)")
    legend_of_curves(axes[0, 1])
    said = "upper bounds of what each verdict bears: a better attack may need less"
    return finish(figure, "The smallest change that turns a patient's verdict", said, note)


def plot_survival(found: survival.SurvivalFound, note: str = "") -> Figure:
    """What is left of an attack once the image was saved, windowed, resized or turned."""
    step = len(found.radii) // 2
    figure, axes = axes_of(1, 2, size=(9.6, 3.8), sharey=True)
    for ax, (name, attacked) in zip(axes[0], found.attacks.items()):
        views = list(found.by_view[name])
        for number, (title, steps) in enumerate(attacked.items()):
            one = steps[step]
            shares = [100 * (one.survives[view] or 0.0) for view in views]
            place = np.arange(len(views)) + 0.27 * (number - 1)
            label = f"{title}: {one.misclassified} of {found.right[name]} misclassified"
            ax.bar(place, shares, width=0.25, color=COLOURS[number], label=label)
        alone = [100 * found.by_view[name][view] for view in views]
        ax.bar(np.arange(len(views)) + 0.27, alone, width=0.25, color="grey", label="view alone, no attack")
        ax.set_xticks(range(len(views)), [view.replace(" by ", "\nby ").replace(" ", "\n", 1) for view in views])
        ax.tick_params(axis="x", labelsize=8)
        ax.set_title(name)
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2))
        percent_axis(ax)
    axes[0, 0].set_ylabel("still misclassified (%)")
    said = f"of the slices that the attack within {radius_label(found.radii[step])} changed; {found.draws} draws a view"
    return finish(figure, "What survives saving and viewing", said, note)


def plot_foreign(found: foreign.ForeignFound, note: str = "") -> Figure:
    """How well each detector tells foreign images from real slices, before and after it is attacked."""
    figure, axes = axes_of(1, 2, size=(9.6, 4.6), sharey=True)
    for ax, (name, detectors) in zip(axes[0], found.detectors.items()):
        rows = [(title, kind, own) for title, watched in detectors.items() for kind, own in watched.foreign.items()]
        for place, (_, _, own) in enumerate(rows):
            ax.plot([100 * own.before.auroc, 100 * own.after.auroc], [-place] * 2, color="grey", linewidth=1)
        before = [100 * own.before.auroc for _, _, own in rows]
        after = [100 * own.after.auroc for _, _, own in rows]
        ax.plot(
            before, [-place for place in range(len(rows))], "o", color=COLOURS[2], label="as they are", markersize=5
        )
        ax.plot(after, [-place for place in range(len(rows))], "v", color=COLOURS[1], label="attacked", markersize=5)
        ax.axvline(50, color="black", linestyle=":", linewidth=1)
        ax.set_yticks([-place for place in range(len(rows))], [f"{title}: {kind}" for title, kind, _ in rows])
        ax.tick_params(axis="y", labelsize=8)
        ax.set(xlabel="AUROC, foreign against real (%)", title=name, xlim=(-3, 103))
    legend_of_curves(axes[0, 1])
    said = f"foreign images attacked within {radius_label(found.foreign_radius)}, towards a lower score; dotted: chance"
    return finish(figure, "Detectors of foreign images, before and after they are attacked", said, note)


def plot_noticed(found: foreign.ForeignFound, note: str = "") -> Figure:
    """Whether detectors notice attacked slices: by somebody who does not know them, and by somebody who does."""
    figure, axes = axes_of(1, 2, size=(9.6, 3.8), sharey=True)
    levels = grey_levels([0.0, *found.radii])
    for ax, (name, detectors) in zip(axes[0], found.detectors.items()):
        for number, (title, watched) in enumerate(detectors.items()):
            shares = [100 * share for share in watched.fooled]
            ax.plot(levels, shares, label=title, clip_on=False, **line_style(number))
        ax.set(xlabel="eps (/255, L-infinity)", title=name, xticks=levels)
        percent_axis(ax)
    axes[0, 0].set_ylabel("misclassified and accepted at once (%)")
    legend_of_curves(axes[0, 1])
    said = "correctly classified slices; a detector accepts 95 % of the validation slices; the attack knows both"
    curves = [[tuple(watched.fooled) for watched in detectors.values()] for detectors in found.detectors.values()]
    hidden = "equal curves hide each other" if any(len(set(own)) < len(own) for own in curves) else ""
    notes = "; ".join(filter(None, [hidden, note]))
    return finish(figure, "Detectors do not stop somebody who knows them", said, notes)


def plot_scans(found: scans.ScansFound, note: str = "") -> Figure:
    """Balanced error under each corruption, of both models, and by how much they differ."""
    kinds = sorted(found.corruptions, key=lambda kind: -found.corruptions[kind].error[PLAIN])
    figure, axes = axes_of(1, 2, size=(10, 4.6), sharey=True)
    place = np.arange(len(kinds))
    for name, hue in HUES.items():
        shown = [100 * found.corruptions[kind].error[name] for kind in kinds]
        axes[0, 0].plot(shown, place, _MARKS[name], color=hue, label=name, markersize=8 if name == PLAIN else 5)
        axes[0, 0].axvline(100 * found.clean[name].error, color=hue, linestyle=":", linewidth=1)
    axes[0, 0].set_yticks(place, kinds)
    axes[0, 0].set_xlabel("balanced error by patient, mean over five severities (%)")
    axes[0, 0].legend(fontsize=8, title="dotted: as scanned", title_fontsize=8)
    gap = np.array([100 * found.corruptions[kind].difference for kind in kinds])
    low, high = (
        np.array([100 * (found.corruptions[kind].interval or [np.nan] * 2)[side] for kind in kinds]) for side in (0, 1)
    )
    bars = np.clip([gap - low, high - gap], 0, None)
    axes[0, 1].errorbar(gap, place, xerr=bars, fmt="o", color="black", capsize=3, markersize=4)
    axes[0, 1].axvline(0, color="grey", linewidth=1)
    axes[0, 1].set_xlabel("hardened minus not hardened (points)\nbelow 0: hardening helps")
    return finish(figure, "Scans that go wrong by themselves", "bars: 95 % over patients", note)


def plot_brackets(found: bracket.BracketFound, note: str = "") -> Figure:
    """For each patient the certified length and the one at which an attack turned the answer."""
    figure, axes = axes_of(size=(9, 3.8))
    ax = axes[0, 0]
    sure = sorted((one for one in found.patients if one.answer >= 0), key=lambda one: (one.lower, one.upper or np.inf))
    ceiling = 2 * max(bracket.RADII)
    for place, one in enumerate(sure):
        right = one.answer == one.ill
        hue = COLOURS[0] if right else COLOURS[1]
        ax.plot([place] * 2, [one.lower, one.upper or ceiling], color=hue, linewidth=2, alpha=0.6)
        ax.plot(place, one.lower, "^", color=hue, markersize=6)
        ax.plot(place, one.upper or ceiling, "v" if one.upper else "_", color=hue, markersize=6)
    for hue, said in ((COLOURS[0], "answer right"), (COLOURS[1], "answer wrong")):
        ax.plot([], [], color=hue, linewidth=2, label=said)
    ax.plot([], [], "^", color="grey", label="certified to bear")
    ax.plot([], [], "v", color="grey", label="turned by an attack")
    if any(one.upper is None for one in sure):
        ax.plot([], [], "_", color="grey", label="no attack turned it")
    ax.axhline(found.longest, color="grey", linestyle=":", label="longest certificate\nof so many copies")
    ax.set(
        yscale="log",
        ylabel="L2 length of a change of all slices\n(pixels in [0, 1])",
        xlabel="test patients",
        xticks=[],
    )
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    said = (
        f"trained on noise of {found.sigma}, {found.samples} copies a patient, error {found.error:g}; "
        f"{len(sure)} of {len(found.patients)} patients get a certificate"
    )
    return finish(figure, "Between which bounds each patient's answer lies", said, note)


#: Name of a figure -> its chapter, and how it is drawn.
FIGURES: Mapping[str, tuple[str, Callable[..., Figure]]] = {
    "names": ("names", plot_names),
    "directions": ("targets", plot_directions),
    "reached": ("targets", plot_reached),
    "regions": ("regions", plot_regions),
    "sufficient_regions": ("regions", plot_sufficient),
    "universal": ("universal", plot_universal),
    "patients": ("patients", plot_patients),
    "survival": ("survival", plot_survival),
    "detectors": ("foreign", plot_foreign),
    "detectors_fooled": ("foreign", plot_noticed),
    "scans": ("scans", plot_scans),
    "brackets": ("bracket", plot_brackets),
}


def draw_atlas(folder: Path) -> dict[Path, Figure]:
    """Path -> figure of each chapter that was measured in a folder."""
    done: dict[str, tuple[ChapterRecord, Any]] = {
        name: read_chapter(folder, name) for name in CHAPTERS if chapter_path(folder, name).is_file()
    }
    return {
        Path(folder) / f"{title}.png": draw(done[chapter][1], caption(done[chapter][0]))
        for title, (chapter, draw) in FIGURES.items()
        if chapter in done
    }


def save_atlas(folder: Path) -> list[Path]:
    """Draw and write them."""
    return [save_figure(figure, path) for path, figure in draw_atlas(folder).items()]


def corruption_sheet(slices: torch.Tensor, note: str = "") -> Figure:
    """Each kind of bad scan at each severity, of one slice, for a reader's eye.

    Args:
        slices: 1 x 1 x H x W in [0, 1].
    """
    figure, axes = axes_of(len(CORRUPTIONS), len(SEVERITIES) + 2, size=(6.4, 0.88 * len(CORRUPTIONS)))
    for row, kind in zip(axes, CORRUPTIONS):
        shown = [slices, *(corrupt_slices(slices, kind, severity, generator(0, kind)) for severity in SEVERITIES)]
        for ax, image in zip(row, shown):
            ax.imshow(image[0, 0].numpy(), cmap="gray", vmin=0, vmax=1)
        row[-1].imshow((shown[-1] - slices)[0, 0].numpy(), cmap="RdBu_r", vmin=-0.5, vmax=0.5)
        for ax in row:
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(False)
        row[0].set_ylabel(kind, rotation=0, ha="right", va="center", fontsize=7)
    last = f"change at {SEVERITIES[-1]}"
    for ax, title in zip(axes[0], ["as scanned", *(f"severity {severity}" for severity in SEVERITIES), last]):
        ax.set_title(title, fontsize=7)
    said = "the middle slice of the first test patient; right: red where it became brighter, blue darker"
    return finish(figure, "Scans that go wrong by themselves", said, note)
