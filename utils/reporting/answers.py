"""The picture beside an answer, the pictures of a volume's preparation, and the sheet of many answers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.core.radii import radius_label
from utils.data.classes import healthy_class
from utils.evaluation.gate import ACCEPTED, REFUSED
from utils.experiments.answer_records import NOT_CLINICAL, UNREADABLE, Answer, FileAnswer
from utils.experiments.prediction import Seen
from utils.experiments.records import display_name
from utils.reporting.style import COLOURS, axes_of, finish

#: Letters of a line of the answer, which takes two of the four columns.
_WIDTH = 76
#: Fewer test cases in a tenth say nothing.
_FEWEST = 5
#: Of a probability in percent, behind the point.
_MOST_DIGITS = 6


def plot_answer(answer: Answer, seen: Seen, classes: Sequence[str]) -> Figure:
    """A case on one page: slice, where the model looked, answer in words; the attack, its change, answers around it."""
    if answer.answer is None:
        return _plot_refusal(answer, seen)
    figure, axes = axes_of(2, 4, size=(13, 6.6), width_ratios=(1, 1.1, 1, 1))
    for ax in axes.flat:
        ax.axis("off")
    if seen.image is not None:
        _picture(axes[0, 0], seen.image, "slice" if answer.kind == "slice" else "middle slice")
    if seen.heat is not None and seen.image is not None:
        _heat(figure, axes[0, 1], seen.image, seen.heat, answer)
    if seen.before is not None:
        axes[1, 2].axis("on")
        _classes(axes[1, 2], answer, seen, classes)
    _words(axes[0, 2], told(answer))
    _attack(axes[1], answer, seen)
    _around(axes[1, 3], answer)
    return finish(figure, f"{answer.case}: what {answer.model} says", NOT_CLINICAL)


def _plot_refusal(answer: Answer, seen: Seen) -> Figure:
    """What was asked, and why it gets no answer."""
    figure, axes = axes_of(1, 2, size=(9, 3.6), width_ratios=(1, 2))
    for ax in axes.flat:
        ax.axis("off")
    if seen.image is not None:
        _picture(axes[0, 0], seen.image, answer.kind)
    _words(axes[0, 1], told(answer), left=0)
    return finish(figure, f"{answer.case}: no answer by {answer.model}", NOT_CLINICAL)


def told(answer: Answer) -> list[str]:
    """An answer in sentences."""
    if answer.verdict == UNREADABLE:
        return [f"Not readable: {answer.reason}.", "No answer.", *answer.notes]
    lines = [f"Gate: {answer.verdict}" + (f". {_sentence(answer.reason)}" if answer.reason else ".")]
    if answer.distance is not None and answer.limit is not None:
        lines.append(
            f"Distance to the nearest of the training slices that the gate compares with: {answer.distance:.2f}, "
            f"refused above {answer.limit:.2f}."
        )
    if answer.answer is None:
        return [*lines, "No answer.", *answer.notes]
    asked = "its probability" if answer.question == "class" else f"probability of {answer.question}"
    chance, limit = _told_apart(answer.probability, answer.threshold)
    from_on = f", {answer.question} from {limit} on" if limit else ""
    lines.append(f"Answer: {answer.answer} ({asked} {chance}{from_on}).")
    lines += _how_such_turned_out(answer)
    if answer.verdict != REFUSED:
        lines.append(_fragile(answer))
    if answer.fragility and answer.fragility.files:
        lines.append("Written to a file and read again: " + ", ".join(_filed(answer.fragility.files)) + ".")
    return [*filter(None, lines), *answer.notes]


def _how_such_turned_out(answer: Answer) -> list[str]:
    lines = []
    if answer.of_such and answer.of_such[0]:
        n, right = answer.of_such
        whose = f" of {answer.of_such_patients} patients" if answer.kind == "slice" and answer.of_such_patients else ""
        low, high = answer.of_such_interval or (None, None)
        sure = f", 95 % interval over patients {low:.0%} to {high:.0%}" if low is not None else ""
        lines.append(
            f"Of {n} test {answer.kind}s{whose} with this answer {right} were right ({right / n:.0%}{sure}; "
            f"{answer.tested_on})."
        )
    if answer.in_tenth and answer.in_tenth[0] >= _FEWEST and answer.probability is not None:
        n, ill = answer.in_tenth
        tenth = min(int(10 * answer.probability), 9)
        lines.append(
            f"Of {n} test {answer.kind}s with a probability of {10 * tenth} to {10 * tenth + 10} %, {ill} had "
            f"{answer.question}."
        )
    return lines


def answers_found(answers: Sequence[Answer]) -> str:
    """What came of all cases, in sentences."""
    answered = [answer for answer in answers if answer.answer is not None]
    lines = [f"{len(answered)} of {len(answers)} cases got an answer; the gate refused or could not read the others."]
    if len(answered) == len(answers):
        lines = [f"All cases got an answer: {len(answers)}."]
    for said in dict.fromkeys(str(answer.answer) for answer in answered):
        own = [answer for answer in answered if answer.answer == said]
        turned = [answer.fragility.radius for answer in own if answer.fragility and answer.fragility.radius is not None]
        within = f" (within {radius_label(max(turned))} a pixel)" if turned else ""
        lines.append(f"{said}: {len(own)}, of which an attack turned {len(turned)} around{within}.")
        known = next((answer for answer in own if answer.of_such), None)
        lines += _how_such_turned_out(known)[:1] if known else []
    return "\n".join(lines)


def answers_table(answers: Sequence[Answer]) -> pd.DataFrame:
    """One row a case: verdict, answer, probability, and the smallest attack that turned it around."""
    return pd.DataFrame([_row(answer) for answer in answers])


def _row(answer: Answer) -> dict[str, object]:
    return {
        # a table program takes what begins so for a formula
        "case": f"'{answer.case}" if answer.case[:1] in "=+-@" else answer.case,
        "model": answer.model,
        "verdict": answer.verdict,
        "answer": answer.answer or "",
        "question": answer.question,
        "probability": answer.probability,
        "threshold": answer.threshold,
        "turned_around_by": answer.fragility.shown if answer.fragility else "",
        "heat_outside_brain": answer.heat_outside,
        "slices": len(answer.slices),
        "reason": answer.reason,
        "notes": " ".join(answer.notes),
        "warning": answer.warning,
    }


def plot_steps(name: str, pictures: Mapping[str, np.ndarray], facts: Mapping[str, object]) -> Figure:
    """Middle slices after each step of a volume's preparation."""
    figure, axes = axes_of(len(pictures), 1, size=(5.5, 1.75 * len(pictures) + 0.6))
    for ax, (title, picture) in zip(axes[:, 0], pictures.items()):
        _picture(ax, picture, title)
    shown = [f"{key.replace('_', ' ')} {value}" for key, value in facts.items() if isinstance(value, (int, float, str))]
    return finish(figure, f"{name}: from the scan to the template", ", ".join(shown), NOT_CLINICAL)


def plot_sheet(answers: Sequence[tuple[Answer, Seen]], *, columns: int = 6, most: int = 60) -> Figure:
    """All cases of a folder at a glance: blue what counts, orange what is doubtful, refused or known from training."""
    shown = list(answers)[:most]
    rows = -(-len(shown) // columns)
    figure, axes = axes_of(rows, columns, size=(2.1 * columns, 2.5 * rows + 0.8))
    for ax in axes.flat:
        ax.axis("off")
    for ax, (answer, seen) in zip(axes.flat, shown):
        # a grey square where there is nothing to show
        ax.imshow(np.full((2, 2), 0.8) if seen.image is None else seen.image, cmap="gray", vmin=0, vmax=1)
        said = answer.verdict if answer.answer is None else _in_brief(answer)
        said += "\nseen in training" if answer.trained_on else ""
        colour = COLOURS[0] if answer.verdict == ACCEPTED and not answer.trained_on else COLOURS[1]
        ax.set_title(f"{_short(answer.case, 22)}\n{said}", fontsize=9, color=colour)
    left = f"the first {most} of {len(answers)} cases" if len(answers) > most else f"{len(answers)} cases"
    orange = "orange: the gate doubts or refuses it, the model was trained on it, or it is not readable"
    return finish(figure, left, orange, NOT_CLINICAL)


def _picture(ax: Axes, image: np.ndarray, title: str) -> None:
    ax.imshow(image, cmap="gray", vmin=0, vmax=1)
    ax.set_title(title, fontsize=10)
    ax.axis("off")


def _heat(figure: Figure, ax: Axes, image: np.ndarray, heat: np.ndarray, answer: Answer) -> None:
    ax.imshow(image, cmap="gray", vmin=0, vmax=1)
    shown = ax.imshow(heat, cmap="inferno", alpha=0.5, vmin=0, vmax=1)
    ax.set_title(
        f"where {display_name(answer.heat_of)} looked\n{answer.heat_outside:.0%} of the heat outside the brain",
        fontsize=10,
    )
    bar = figure.colorbar(shown, ax=ax, shrink=0.7)
    bar.set_label("Grad-CAM, share of its maximum", fontsize=8)


def _classes(ax: Axes, answer: Answer, seen: Seen, classes: Sequence[str]) -> None:
    sides = [("as it is", seen.before, COLOURS[0])]
    if seen.after is not None:
        sides.append(("attacked", seen.after, COLOURS[1]))
    height = 0.8 / len(sides)
    for number, (name, chances, colour) in enumerate(sides):
        places = np.arange(len(classes)) + (number - (len(sides) - 1) / 2) * height
        ax.barh(places, [100 * chance for chance in chances or []], height, color=colour, label=name)
    ax.set(yticks=range(len(classes)), yticklabels=list(classes), xlim=(0, 100), xlabel="calibrated probability (%)")
    ax.invert_yaxis()
    ax.legend(fontsize=8, loc="lower right")
    healthy = healthy_class(classes)
    if answer.threshold is not None and healthy is not None:
        place, edge = list(classes).index(healthy), 100 * (1 - answer.threshold)
        ax.plot([edge, edge], [place - 0.5, place + 0.5], color="black", linestyle=":", linewidth=1.5)
        ax.set_title(f"dotted: {healthy} below it means {answer.question}", fontsize=9)


def _attack(axes: np.ndarray, answer: Answer, seen: Seen) -> None:
    if answer.fragility and answer.fragility.radius is None:
        text = f"no attack up to {radius_label(answer.fragility.tried)}\nturned the answer around"
        axes[0].text(0.5, 0.5, text, ha="center", va="center", fontsize=10, transform=axes[0].transAxes)
    if seen.attacked is None or seen.image is None or seen.eps is None or answer.fragility is None:
        return
    _picture(axes[0], seen.attacked, f"attacked within {radius_label(seen.eps)}\n{_turned_into(answer)}")
    shown = axes[1].imshow(seen.attacked - seen.image, cmap="RdBu_r", vmin=-seen.eps, vmax=seen.eps)
    axes[1].set_title("what the attack changed", fontsize=10)
    bar = axes[1].figure.colorbar(shown, ax=axes[1], shrink=0.7, ticks=[-seen.eps, 0, seen.eps])
    bar.ax.set_yticklabels([f"-{radius_label(seen.eps)}", "0", radius_label(seen.eps)], fontsize=8)


def _told_apart(chance: float | None, threshold: float | None, digits: int = 1) -> tuple[str, str]:
    """A probability and its threshold in percent, with as many digits as tell them apart; "" for what is unknown."""

    def written(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}%}"

    while chance != threshold and written(chance, digits) == written(threshold, digits) and digits < _MOST_DIGITS:
        digits += 1
    return written(chance, digits), written(threshold, digits)


def _turned_into(answer: Answer) -> str:
    """The attacked answer and, where a threshold makes it, by how much."""
    found = answer.fragility
    if found is None or found.probability is None or answer.threshold is None:
        return f"answer: {found.answer if found else ''}"
    chance, limit = _told_apart(found.probability, answer.threshold, digits=0)
    return f"answer: {found.answer}\n({answer.question} {chance}, from {limit} on)"


def _around(ax: Axes, answer: Answer) -> None:
    """Members of a vote, or slices of a patient, beside the threshold."""
    if answer.members:
        ax.axis("on")
        ax.barh(range(len(answer.members)), [100 * chance for chance in answer.members.values()], color=COLOURS[5])
        ax.set(yticks=range(len(answer.members)), yticklabels=list(answer.members), xlim=(0, 100))
        ax.set_xlabel(f"probability of {answer.question} by each member (%)")
    elif len(answer.slices) > 1 and answer.answer is not None:
        ax.axis("on")
        chances = [100 * (own.probability or 0) for own in answer.slices]
        colours = [COLOURS[1] if own.verdict == REFUSED else COLOURS[0] for own in answer.slices]
        ax.scatter(range(len(chances)), chances, c=colours, s=18)
        ax.set(ylim=(0, 100), xlabel="slice, from the lowest to the highest")
        ax.set_ylabel(f"{answer.question} by single slice (%)")
        if answer.slice_threshold is not None:
            ax.axhline(100 * answer.slice_threshold, color="grey", linestyle="--", linewidth=1)
            ax.set_title(f"dashed: {answer.slice_threshold:.0%}, from which\na slice alone is called so", fontsize=9)
    if ax.axison and answer.threshold is not None and answer.members:
        ax.axvline(100 * answer.threshold, color="grey", linestyle="--", linewidth=1)


def _words(ax: Axes, lines: Sequence[str], *, left: float = -0.1) -> None:
    text = "\n\n".join(textwrap.fill(line, _WIDTH) for line in lines)
    # over two columns, whose width the layout must not give to one
    ax.text(left, 1, text, va="top", fontsize=10, transform=ax.transAxes).set_in_layout(False)


def _fragile(answer: Answer) -> str:
    found = answer.fragility
    if found is None:
        return ""
    if found.radius is None:
        return f"No attack up to {radius_label(found.tried)} turned the answer around ({found.attack})."
    return (
        f"A change of at most {found.shown} a pixel turns it into {found.answer} ({found.attack}; an upper bound: a "
        "better attack may need less)."
    )


def _in_brief(answer: Answer) -> str:
    of = "" if answer.question == "class" else f"\n{answer.question} {answer.probability:.0%}"
    return f"{answer.answer}{of}"


def _filed(files: Mapping[str, FileAnswer]) -> list[str]:
    return [f"{kind} {'still ' if own.survives else 'again '}{own.answer}" for kind, own in files.items()]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else "…" + text[1 - length :]
