"""Whose slice is it? Patient ids that the source itself gives: a table, file names, or one folder a patient.

Ids win over anything that pixels suggest. Two scans or visits of one person carry one id, so they are one patient.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from utils.data.text_tables import read_text_table

UNKNOWN = -1

#: Ids of the field's cohorts, found in file or folder names. The first that names most images is taken.
PATTERNS: dict[str, str] = {
    "OASIS": r"OAS[1-4][_-]?\d{4,5}",
    "ADNI": r"\d{3}[_-]S[_-]\d{4,5}",
    "BIDS": r"sub-[A-Za-z0-9]+",
    "IXI": r"IXI\d{3}",
    "AIBL": r"AIBL[_-]?\d+",
    "NACC": r"NACC\d{6}",
    "MIRIAD": r"miriad[_-]?\d+",
    "patient number": r"(?:subject|subj|sub|patient|participant|pat)[ _-]?\d+",
}
#: Folders below a class that hold kinds of images, not people.
_KINDS = re.compile(
    r"(axial|coronal|sagittal|images?|imgs?|slices?|data|raw|scans?|mri?|t1w?|t2w?|flair|pet|ct|train|test|val(id(ation)?)?"
    r"|anat|ses-\w+|png|jpe?g|original|augmented"
    r"|(slices?|levels?|visit|v|session|timepoint|tp|batch|part|fold|run)[ _-]?\d+)",
    re.IGNORECASE,
)
#: ``P001_v2``, ``P001_ses-1``, ``P001_2019-05-01``: a patient with a number, and one of its visits.
_VISIT = re.compile(
    r"(.*\d.*?)[ _-]+(?:(?:v|visit|ses|session|tp|timepoint|scan|m|month|y|year)[ _-]?\d+"
    r"|(?:19|20)\d\d[_-]?\d\d[_-]?\d\d)",
    re.IGNORECASE,
)
#: ``sub07ses1``: a visit that is written into the id itself.
_GLUED = re.compile(r"(?<=\d)(?:ses|visit)\d+$")
#: ``12_5``, ``Image 12 (5)``: a name with a number, and behind it another one, of the slice perhaps.
_NUMBERED = re.compile(r"(.*\d.*?)[ _.(-]+\d+\)?")
#: Ids that name fewer of the images are taken for a coincidence; of those that name more, the rest is left out.
_LEAST_SHARE = 0.5
#: Fewer folders than these tell nothing about what they hold.
_FEWEST_FOLDERS = 4
#: Share of patients that may have changed their class between visits.
_CONVERTED_SHARE = 0.2

#: Entries of a column of patients that name none.
_NO_NAMES = {"", "na", "n/a", "nan", "none", "null", "unknown", "?", "-"}

#: Names of columns of images and of patients, the first that is there counts.
PATH_COLUMNS = ("path", "image", "file", "filename", "image_path")
SUBJECT_COLUMNS = ("subject", "patient", "subject_id", "patient_id", "participant_id", "ptid")


@dataclass(frozen=True)
class NamedSubjects:
    """Patient ids of N images.

    Attributes:
        subject: int64 array N, 0-based ids in the order of their names; ``UNKNOWN`` for images of nobody.
        origin: where the ids stand, in words.
        notes: what a reader should know, one sentence each.
        guessed: the names only suggest patients, and pixels have to confirm them.
    """

    subject: np.ndarray
    origin: str
    notes: tuple[str, ...] = ()
    guessed: bool = False

    @property
    def unnamed(self) -> int:
        """Images of nobody."""
        return int((self.subject == UNKNOWN).sum())


def find_ids(
    paths: Sequence[str], labels: Sequence[int], passed: Collection[str] = (), *, pattern: str | None = None
) -> NamedSubjects | None:
    """Patients that the paths name, or None.

    Args:
        paths: N, relative to the source, with either kind of slash.
        labels: N classes.
        passed: folder names that mean classes or sides; a patient's folder is the first one below these.
        pattern: regular expression of an id in a path, instead of ``PATTERNS``; its first group, if it has one, is the
            id.

    Raises:
        ValueError: ``pattern`` is no regular expression, or some path has no such id.
    """
    forward = [path.replace("\\", "/") for path in paths]
    if pattern:
        return _by_own_pattern(forward, pattern)
    found = {name: _match(forward, text) for name, text in PATTERNS.items()}
    counts = {name: sum(own is not None for own in ids) for name, ids in found.items()}
    best = max(counts, key=counts.__getitem__)
    if len(paths) and counts[best] >= _LEAST_SHARE * len(paths):
        return _number(found[best], f"{best} ids in the names")
    folders = _patient_folders(forward, labels, set(passed))
    if folders:
        return _without_visits(folders, "one folder a patient")
    numbers = [_NUMBERED.fullmatch(path.rsplit("/", 1)[-1].rsplit(".", 1)[0]) for path in forward]
    numbered = [match[1] for match in numbers if match]
    if len(numbered) < len(numbers) or not numbers:
        return None
    return replace(_number(numbered, "numbers in the names, confirmed by pixels"), guessed=True)


def id_in(path: str) -> str | None:
    """The first id of ``PATTERNS`` in a path, as it is written there; None where there is none.

    >>> id_in("scans/OAS1_0028_MR1_mpr-1_100.jpg"), id_in("brain.png")
    ('OAS1_0028', None)
    """
    found = (re.search(rf"(?<![A-Za-z0-9])({text})(?![A-Za-z0-9])", path, re.IGNORECASE) for text in PATTERNS.values())
    return next((match[1] for match in found if match), None)


def own_pattern(pattern: str) -> re.Pattern[str]:
    """A pattern of somebody's own.

    Raises:
        ValueError: it is no regular expression, or an empty one.
    """
    if not pattern:
        raise ValueError("--subject-pattern is empty; leave it out, or say what a patient's id looks like")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--subject-pattern {pattern!r} is no regular expression: {error}") from error


def _by_own_pattern(paths: list[str], pattern: str) -> NamedSubjects:
    own = own_pattern(pattern)
    matches = [own.search(path) for path in paths]
    missing = [path for path, match in zip(paths, matches) if match is None]
    if missing:
        raise ValueError(
            f"--subject-pattern {pattern!r} finds no patient in {len(missing)} of {len(paths)} paths, for example "
            f"{missing[0]}"
        )
    found = [match[1] if own.groups else match[0] for match in matches if match]
    return _number(found, f"names, by the pattern {pattern}")


def _match(paths: list[str], pattern: str) -> list[str | None]:
    # an id is a word of its own: 002_S_0295 is not found in 1002_S_02951
    word = re.compile(rf"(?<![A-Za-z0-9])({pattern})(?![A-Za-z0-9])", re.IGNORECASE)
    ids: list[str | None] = []
    for path in paths:
        own = {_GLUED.sub("", re.sub(r"[ _-]", "", text).lower()) for text in word.findall(path)}
        ids.append(own.pop() if len(own) == 1 else None)
    return ids


def _patient_folders(paths: list[str], labels: Sequence[int], passed: set[str]) -> list[str] | None:
    """The folder below the class of each image, where these look like one a patient."""
    below = [_folders_of_people(path, passed) for path in paths]
    if not all(below):
        return None
    # what all images lie in, such as the set's own name, names nobody
    depth = next((level for level in range(min(map(len, below))) if len({parts[level] for parts in below}) > 1), None)
    if depth is None:
        return None
    names = [parts[depth] for parts in below]
    classes = defaultdict(set)
    for name, label in zip(names, labels):
        classes[name].add(label)
    if len(classes) < _FEWEST_FOLDERS:
        return None
    again = sum(len(own) > 1 for own in classes.values())
    if again <= _CONVERTED_SHARE * len(classes):
        return names
    # people are not in all classes, but numbers that begin anew in each class are
    numbered = all(re.search(r"\d", name) for name in classes)
    return [f"{label}/{name}" for label, name in zip(labels, names)] if numbered else None


def _folders_of_people(path: str, passed: set[str]) -> list[str]:
    return [part for part in path.split("/")[:-1] if part not in passed and not _KINDS.fullmatch(part)]


def _without_visits(names: Sequence[str], origin: str) -> NamedSubjects:
    """Names as numbers, where those that differ in their visit alone are one patient."""
    visits = [_VISIT.fullmatch(name) for name in names]
    people = [match[1] if match else name for name, match in zip(names, visits)]
    found, merged = _number(people, origin), len(set(names)) - len(set(people))
    if not merged:
        # by the names as they are: their order decides whom a seed draws
        return _number(names, origin)
    shown = sorted({name for name, match in zip(names, visits) if match})[:2]
    note = (
        f"{len(set(names))} folders are visits of {len(set(people))} patients, by names such as {' and '.join(shown)}."
    )
    return replace(found, notes=(*found.notes, note))


def same_person(name: str) -> str:
    """What the ways of writing one id have in common: case, leading zeros and a decimal point of zeros say nothing.

    Nor does whether a letter and its accent are one sign or two.

    >>> same_person("007"), same_person("7.0"), same_person("Sub-07"), same_person("-1.0"), same_person("p10")
    ('7', '7', 'sub-7', '-1', 'p10')
    """
    bare = unicodedata.normalize("NFC", name).strip().casefold()
    whole = re.fullmatch(r"(-?\d+)\.0*", bare)
    return re.sub(r"(?<![\d.])0+(?=\d)", "", whole[1] if whole else bare)


def _one_spelling(names: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Each name in the first of its spellings, and a note where there are several."""
    spelled = defaultdict(set)
    for name in names:
        spelled[same_person(name)].add(name)
    several = sorted(sorted(own) for own in spelled.values() if len(own) > 1)
    first = {name: min(own) for own in spelled.values() for name in own}
    notes: tuple[str, ...] = ()
    if several:
        shown = " and ".join(several[0][:3])
        notes = (
            f"{len(several)} patients are written in several ways, such as {shown}; each was taken for one person.",
        )
    return [first[name] for name in names], notes


def _number(ids: Sequence[str | None], origin: str) -> NamedSubjects:
    """Names as numbers, and what is to be said of those without one."""
    spelled, notes = _one_spelling([own or "" for own in ids])
    names = np.array(spelled)
    subject = np.unique(names, return_inverse=True)[1].astype(np.int64)
    unnamed = names == ""
    if unnamed.any():
        subject = np.where(unnamed, UNKNOWN, subject - 1)
    if unnamed.any():
        notes += (
            f"{unnamed.sum()} of {len(names)} images carry no patient id, or two, unlike the others "
            f"({origin}): they are left out of a patient split.",
        )
    return NamedSubjects(subject, origin, notes)


def read_subjects_csv(path: str | Path, image_paths: Sequence[str]) -> np.ndarray:
    """The patients of :func:`subjects_of_table`, int64."""
    return subjects_of_table(path, image_paths).subject


def subjects_of_table(path: str | Path, image_paths: Sequence[str]) -> NamedSubjects:
    """Patient ids in the order of ``image_paths``; -1 in the file means nobody.

    A row fits an image if one of their paths ends with the other, whole folder names at a time and with either kind of
    slash: file names alone will do where each is there once.

    Args:
        path: CSV with a column ``path`` (or image, file, filename, image_path) and a column ``subject`` (or patient,
            subject_id, patient_id, participant_id, ptid).

    Raises:
        ValueError: not such a CSV, two patients for one image, or none.
    """
    table = _read_table(path)
    doubled = table["path"][table["path"].duplicated()].tolist()
    if doubled:
        raise ValueError(f"{path} names two patients for {doubled[0]}")
    rows = dict(zip(table["path"], table["subject"]))
    by_name = defaultdict(list)
    for row in rows:
        by_name[row.rsplit("/", 1)[-1]].append(row)
    found = [_row_of(image.replace("\\", "/"), by_name, path) for image in image_paths]
    missing = [image for image, row in zip(image_paths, found) if row is None or is_missing(rows[row])]
    if missing:
        raise ValueError(
            f"{path} names no patient for {len(missing)} images, for example {missing[0]}; write -1 for those of nobody"
        )
    return numbered([rows[row] for row in found], f"the table {Path(path).name}")


def is_missing(text: str) -> bool:
    """Whether an entry of a column of patients names none, such as an empty one or ``NA``; -1 names nobody."""
    return text.strip().casefold() in _NO_NAMES


def numbered(names: Sequence[str], origin: str) -> NamedSubjects:
    """Patients as numbers in the order of their names; -1 means nobody, and one id written in two ways one person."""
    spelled, notes = _one_spelling(names)
    subjects = np.array(spelled)
    nobody = np.array([same_person(name) == str(UNKNOWN) for name in spelled])
    numbers = np.where(nobody, UNKNOWN, np.unique(subjects, return_inverse=True)[1]).astype(np.int64)
    return NamedSubjects(numbers, origin, notes)


def _read_table(path: str | Path) -> pd.DataFrame:
    """Columns ``path``, with forward slashes, and ``subject``; each pair once."""
    table = read_text_table(path)
    names = {str(column).strip().lower(): column for column in table.columns}
    chosen = [next((names[n] for n in known if n in names), None) for known in (PATH_COLUMNS, SUBJECT_COLUMNS)]
    if None in chosen:
        raise ValueError(f"{path} needs the columns path and subject, it has {list(table.columns)}")
    table = table[chosen].set_axis(["path", "subject"], axis=1)
    table["path"] = table["path"].str.replace("\\", "/", regex=False).str.removeprefix("./")
    return table.drop_duplicates()


def _row_of(image: str, by_name: dict[str, list[str]], table: str | Path) -> str | None:
    """The row that means this image: the one whose path agrees with it over its whole length."""
    rows = [row for row in by_name[image.rsplit("/", 1)[-1]] if _ends_alike(row, image)]
    if len(rows) > 1:
        # the image's own path is the strictest match there is
        rows = [row for row in rows if row == image] or rows
    if len(rows) > 1:
        raise ValueError(f"{table}: {rows[0]} and {rows[1]} could both mean {image}; name their folders too")
    return rows[0] if rows else None


def _ends_alike(one: str, other: str) -> bool:
    short, long = sorted((one.split("/"), other.split("/")), key=len)
    return long[-len(short) :] == short


def converted(subject: np.ndarray, labels: np.ndarray) -> int:
    """How many patients have images of several classes: a diagnosis that changed between visits, or a wrong id."""
    pairs = {(int(who), int(label)) for who, label in zip(subject, labels) if who != UNKNOWN}
    return sum(times > 1 for times in Counter(who for who, _ in pairs).values())
