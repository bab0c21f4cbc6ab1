"""The chapters of the atlas, and their records.

    python -m utils atlas --model EfficientNetB0 --hardened EfficientNetB0_atk --out assets/Atlas

Each chapter leaves a file of its own and is not measured again; a file of other models, data or budget is refused. A
chapter that was killed goes on from what its bench's cache holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.core.parts import Part, read_part
from utils.core.paths import write_json
from utils.core.reproducibility import environment_facts
from utils.data.sets import DataFacts
from utils.experiments.atlas import bracket, foreign, names, patients, regions, scans, survival, targets, universal
from utils.experiments.atlas.bench import Bench
from utils.experiments.specification import refuse_other

_REMEDY = "give an --out of another name, or delete the file"
#: Where a chapter is only read, as by pages and figures.
_DAMAGED = "restore it, or delete it and measure the chapter again"


@dataclass(frozen=True)
class Chapter:
    """One chapter: what it asks, how it is measured, and the type of what it finds."""

    name: str
    question: str
    measure: Callable[[Bench], Any]
    kind: type[Part]


_ALL = (
    Chapter("names", "What does each attack leave, and what does it cost?", names.measure, names.NamesFound),
    Chapter("targets", "Which way are answers turned?", targets.measure, targets.TargetsFound),
    Chapter("regions", "How much of a slice does an attack need?", regions.measure, regions.RegionsFound),
    Chapter("universal", "Does one change fool everybody?", universal.measure, universal.UniversalFound),
    Chapter("patients", "How small a change turns a patient?", patients.measure, patients.PatientsFound),
    Chapter("survival", "What survives saving and viewing?", survival.measure, survival.SurvivalFound),
    Chapter("foreign", "Do detectors notice, if they are attacked too?", foreign.measure, foreign.ForeignFound),
    Chapter("scans", "What do scans do that go wrong by themselves?", scans.measure, scans.ScansFound),
    Chapter("bracket", "Between which bounds does each answer lie?", bracket.measure, bracket.BracketFound),
)
CHAPTERS: dict[str, Chapter] = {chapter.name: chapter for chapter in _ALL}


class ChapterRecord(Part):
    """What a chapter's file holds.

    Attributes:
        facts: of :meth:`utils.experiments.atlas.bench.Bench.facts`.
        found: by the chapter's own type, see :func:`found_in`.
        seconds: of the run that ended; where ``resumed``, less than the chapter takes.
        resumed: whether a run before it, which did not end, had left something to go on from.
    """

    question: str
    facts: dict[str, Any]
    data: DataFacts
    note: str
    found: dict[str, Any]
    seconds: float
    resumed: bool = False
    environment: dict[str, Any]


def chapter_path(folder: Path, name: str) -> Path:
    """Where a chapter lies."""
    return Path(folder) / f"{name}.json"


def check_chapters(names: Sequence[str]) -> list[Chapter]:
    """Chapters by name; all of them where none is named.

    Raises:
        ValueError: no such chapter.
    """
    wrong = [name for name in names if name not in CHAPTERS]
    if wrong:
        raise ValueError(f"the atlas has the chapters {', '.join(CHAPTERS)}, not {', '.join(wrong)}")
    return [CHAPTERS[name] for name in names or CHAPTERS]


def read_chapter(folder: Path, name: str) -> tuple[ChapterRecord, Any]:
    """A chapter's record, and what it found as its own type.

    Raises:
        FileNotFoundError: it was not measured.
        ValueError: the file is not whole.
    """
    path = chapter_path(folder, name)
    record = read_part(ChapterRecord, path, _DAMAGED)
    return record, found_in(record, name, path)


def found_in(record: ChapterRecord, name: str, where: Path) -> Any:
    """What a record's chapter found, as its own type.

    Raises:
        ValueError: the file is not whole.
    """
    from utils.core.parts import parsed

    return parsed(CHAPTERS[name].kind, record.found, where, _DAMAGED)


def measure_chapter(bench: Bench, name: str, folder: Path, *, note: str = "") -> Any:
    """What a chapter finds: from its file, or measured and written there.

    Args:
        note: of :meth:`utils.data.workspace.Workspace.note`, for figures and tables.

    Raises:
        ValueError: no such chapter, or a file of other models, data, seed or budget.
    """
    chapter, path = check_chapters([name])[0], chapter_path(folder, name)
    if path.is_file():
        record, found = read_chapter(folder, name)
        refuse_other(path, _plain(record.facts), _plain(bench.facts(name)), _REMEDY)
        return found
    resumed, begun = bench.pieces(name).begun, time.perf_counter()
    found = chapter.measure(bench)
    record = ChapterRecord(
        question=chapter.question,
        facts=bench.facts(name),
        data=DataFacts(**bench.splits.info),
        note=note,
        found=found.plain(),
        seconds=round(time.perf_counter() - begun, 1),
        resumed=resumed,
        environment=environment_facts(),
    )
    write_json(path, record.plain())
    return found


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts one level deep, so that a message can name the one that differs."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        entries = value.items() if isinstance(value, Mapping) else [("", value)]
        flat |= {f"{name} {key}".strip(): own for key, own in entries}
    return flat
