"""What the attack atlas found, in sentences that are computed from its records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from utils.experiments.atlas import foreign, scans, targets
from utils.experiments.atlas.bench import HARDENED, PLAIN
from utils.experiments.atlas.chapters import ChapterRecord


def verdict(own: scans.Damage) -> str:
    """Whether hardening helps or hurts beyond chance under one kind of bad scan."""
    low, high = own.interval or (-1.0, 1.0)
    if high < 0:
        return "helps"
    return "hurts" if low > 0 else "cannot be told"


def learnt(chapters: Sequence[tuple[ChapterRecord, Any]]) -> str:
    """What the atlas found, in sentences that are computed from its records, as a list."""
    found = {record.facts["section"]: own for record, own in chapters}
    told = [(name, say) for name, say in _SENTENCES if name in found]
    return "".join(f"- {say(found[name])}\n" for name, say in told)


def _on_directions(found: targets.TargetsFound) -> str:
    step = found.radii.index(1 / 255)
    plain, hard = (found.directions[name] for name in (PLAIN, HARDENED))

    def turned(one: targets.Share) -> str:
        return f"{one.count} of {one.of}"

    slices = found.whom.slices // found.whom.patients
    return (
        f"Within 1/255 (L∞) an attack on {slices} slices of each patient hides the illness of "
        f"{turned(plain.hidden[step])} ill patients that were found ill and invents one in "
        f"{turned(plain.invented[step])} healthy ones that were found healthy; with hardening, in "
        f"{turned(hard.hidden[step])} and {turned(hard.invented[step])}."
    )


def _on_scans(found: scans.ScansFound) -> str:
    told = [verdict(own) for own in found.corruptions.values()]
    lower = sum(own.difference < 0 for own in found.corruptions.values())
    worst = found.worst["motion"]
    return (
        f"Of {len(told)} kinds of bad scans (noise, motion, …) hardening lowers the error in {lower}, in "
        f"{told.count('helps')} of them beyond chance, and raises it beyond chance in {told.count('hurts')}; the worst "
        f"of {found.draws} plausible motions turns {worst[PLAIN].worst.count} of {worst[PLAIN].worst.of} patients, and "
        f"{worst[HARDENED].worst.count} of {worst[HARDENED].worst.of} with hardening."
    )


def _on_detectors(found: foreign.ForeignFound) -> str:
    step = found.radii.index(2 / 255) + 1
    parts = []
    for name, detectors in found.detectors.items():
        shares = sorted(100 * own.fooled[step] for own in detectors.values())
        told = f"{shares[0]:.0f}" if round(shares[0]) == round(shares[-1]) else f"{shares[0]:.0f} to {shares[-1]:.0f}"
        parts.append(f"{told} % of the correctly classified slices ({name})")
    return (
        "A detector that is attacked too is no defence: within 2/255 (L∞) an attacker who knows it gets "
        f"{' and '.join(parts)} both misclassified and accepted, whichever of {len(detectors)} detectors is used."
    )


_SENTENCES: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("targets", _on_directions),
    ("scans", _on_scans),
    ("foreign", _on_detectors),
)
