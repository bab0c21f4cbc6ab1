"""The patient as target: all slices changed together, free, smooth from slice to slice, or all alike."""

from __future__ import annotations

from pydantic import Field

from utils.attacks.attack import Attack
from utils.attacks.linked import LINKS
from utils.core.parts import Part
from utils.evaluation.curve import NEVER
from utils.experiments.atlas.bench import Bench, Whom, whom

#: Radii that are tried, the smallest first.
FINE = tuple(k / 255 for k in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16))


class PatientsFound(Part):
    """Smallest radii, upper bounds of what each verdict bears.

    Attributes:
        smallest: model -> link -> of each patient whose verdict is right, the first of ``radii`` that turned it; None
            where none did.
        subjects: model -> whose verdict is right, in the order of ``smallest``; empty in records from before it.
    """

    whom: Whom
    radii: list[float]
    smallest: dict[str, dict[str, list[float | None]]]
    subjects: dict[str, list[int]] = Field(default_factory=dict)

    def nested(self) -> dict[str, dict[str, list[float | None]]]:
        """``smallest``, each link with what a narrower one found.

        One change for all slices is also smooth, and a smooth one lies among the free: who is turned by it is turned
        by the wider kind too, whose own attack may only have missed it.
        """
        found: dict[str, dict[str, list[float | None]]] = {}
        for name, links in self.smallest.items():
            known: list[float | None] = [None] * max(map(len, links.values()), default=0)
            own = {}
            for link in [link for link in reversed(LINKS) if link in links]:
                known = [_least(pair) for pair in zip(known, links[link], strict=True)]
                own[link] = known
            found[name] = {link: own[link] for link in links}
        return found


def _least(radii: tuple[float | None, ...]) -> float | None:
    return min((radius for radius in radii if radius is not None), default=None)


def measure(bench: Bench) -> PatientsFound:
    """Attack each patient's verdict at growing radii."""
    found: dict[str, dict[str, list[float | None]]] = {name: {} for name in bench.models}
    subjects: dict[str, list[int]] = {}
    for name in bench.models:
        for link in LINKS:
            attack = Attack("linked", steps=bench.budget.steps, options={"link": link})
            curve = bench.attacked(bench.verdict(name), bench.questions(), attack, bench.radii(FINE), batch_size=16)
            found[name][link] = [
                None if step == NEVER else curve.epsilons[step] for step in curve.first_broken if step != 0
            ]
            right = [subject for subject, step in zip(bench.stacks.subjects.tolist(), curve.first_broken) if step != 0]
            subjects[name] = right
    return PatientsFound(whom=whom(bench), radii=list(bench.radii(FINE)), smallest=found, subjects=subjects)
