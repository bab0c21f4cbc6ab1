"""Which scans a cohort holds, of whom, and in which class: class folders of volumes, BIDS, OASIS-1's discs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from utils.data.classes import check_class_name
from utils.data.folders import files_in, folders_in, is_dicom, is_image
from utils.data.scans.standard import Cut, Stripping
from utils.data.scans.volume import is_volume
from utils.data.subject_ids import UNKNOWN, find_ids
from utils.data.text_tables import read_text_table

#: Columns of a BIDS table in which a diagnosis stands, unless another is named.
_LABEL_COLUMNS = ("diagnosis", "dx", "group", "label", "class", "cdr")
#: Endings of BIDS files of a modality.
_BIDS_ENDINGS = {"T1": "T1w", "T2": "T2w", "FLAIR": "FLAIR", "PET": "pet", "CT": "ct"}
#: Clinical Dementia Rating -> class.
CDR_CLASSES = {"0": "Non", "0.5": "VeryMild", "1": "Mild", "2": "Moderate", "3": "Severe"}
_OASIS_FOLDER = re.compile(r"OAS1_\d{4}_MR\d+", re.IGNORECASE)
#: Files of an OASIS-1 session, the best first, and whether the brain alone is left in them.
_OASIS_FILES = (("*t88_masked_gfc.hdr", True), ("*t88_gfc.hdr", False), ("*mpr-1_anon.hdr", False))
_MOST_NAMED = 5
#: What stands in a table where nothing is known, and the class of those who are left out.
_NOTHING, _NOBODY = ("", "n/a", "nan"), "-"


@dataclass(frozen=True)
class ScanOptions:
    """How a cohort of whole heads is read.

    Attributes:
        label_column: of a cohort's table; without it the first that is known, such as diagnosis or CDR.
        label_map: value=class for each value of that column; the class - leaves people out.
        modality: T1, T2, FLAIR, PET or CT.
        stripped: the volumes show nothing but the brain already.
        slices: slices of each head, evenly spaced.
        plane: axial, coronal or sagittal.
    """

    label_column: str = ""
    label_map: tuple[str, ...] = ()
    modality: str = "T1"
    stripped: bool = False
    slices: int = Cut().count
    plane: str = "axial"

    @property
    def cut(self) -> Cut:
        """Which slices."""
        return Cut(self.plane, self.slices)

    @property
    def mapping(self) -> dict[str, str]:
        """Value -> class.

        Raises:
            ValueError: an entry without ``=``.
        """
        pairs = [entry.partition("=") for entry in self.label_map]
        wrong = [entry for entry, parts in zip(self.label_map, pairs) if not all(parts)]
        if wrong:
            raise ValueError(f"--label-map needs value=class, such as 0.5=VeryMild, not {wrong[0]!r}")
        return {value.strip(): name.strip() for value, _, name in pairs}


@dataclass(frozen=True)
class Scan:
    """One head of a cohort: its files (a volume, or the slices of a series), patient and class."""

    name: str
    files: tuple[Path, ...]
    subject: str
    label: str
    stripping: Stripping


@dataclass
class Cohort:
    """All scans, what was left out, and whether anything names the patients."""

    scans: list[Scan]
    kind: str
    notes: list[str] = field(default_factory=list)
    named: bool = True


def find_cohort(folder: Path, options: ScanOptions) -> Cohort | None:
    """The scans of a folder; None where it holds no volumes and no DICOM, or more pictures than these.

    Raises:
        ValueError: a table without the column, with values that mean no class, or without one of the people; no
            classes. The message names file and value.
    """
    files = sorted(files_in(folder))
    heads = [file for file in files if is_volume(file) or (not file.suffix and is_dicom(file)) or _named_dicom(file)]
    if not heads or sum(map(is_image, files)) > len(heads):
        return None
    if any(_OASIS_FOLDER.fullmatch(place.name) for place in _all_folders(folder)):
        return _oasis(folder, files, options)
    tables = [file for file in files if file.name.lower() == "participants.tsv"]
    return _bids(tables[0], options) if tables else _class_folders(folder, options)


def _named_dicom(file: Path) -> bool:
    return file.suffix.lower() in (".dcm", ".ima", ".dicom") and is_dicom(file)


def _all_folders(folder: Path) -> list[Path]:
    return [place for place in folder.rglob("*") if place.is_dir()]


def _bids(table: Path, options: ScanOptions) -> Cohort:
    people = read_text_table(table)
    if "participant_id" not in people:
        raise ValueError(f"{table} has no column participant_id; it has {', '.join(people.columns)}")
    labels = _labels(table, people, "participant_id", options)
    root, ending = table.parent, _BIDS_ENDINGS[options.modality]
    scans, without = [], []
    for place in sorted(root.glob("sub-*")):
        found = sorted(file for file in files_in(place) if re.search(rf"_{ending}\.(nii|nii\.gz)$", file.name))
        if place.name not in labels and found:
            without.append(place.name)
        for file in found if place.name in labels else ():
            name = re.sub(r"\.nii(\.gz)?$", "", file.name)
            scans.append(Scan(name, (file,), place.name, labels[place.name], Stripping(stripped=options.stripped)))
    if not scans:
        raise ValueError(f"{root} holds no sub-*/…_{ending}.nii.gz of a person whose class {table.name} tells")
    return Cohort(scans, "BIDS", _left_out(without, "scans of people without a class"))


def _oasis(folder: Path, files: Sequence[Path], options: ScanOptions) -> Cohort:
    """OASIS-1 (Marcus et al., 2007): a folder a session, and the cross-sectional table with CDR."""
    tables = [file for file in files if file.suffix.lower() in (".csv", ".tsv") and "oasis" in file.name.lower()]
    if not tables:
        raise ValueError(f"{folder} holds sessions of OASIS-1, but not its table (oasis_cross-sectional….csv) with CDR")
    people = read_text_table(tables[0])
    if "ID" not in people:
        raise ValueError(f"{tables[0]} has no column ID; it has {', '.join(people.columns)}")
    column = options.label_column or "CDR"
    own = ScanOptions(column, options.label_map or tuple(f"{value}={name}" for value, name in CDR_CLASSES.items()))
    labels = _labels(tables[0], people, "ID", own)
    scans, without = [], []
    for place in sorted(p for p in _all_folders(folder) if _OASIS_FOLDER.fullmatch(p.name)):
        if place.name not in labels:
            without.append(place.name)
            continue
        found = [(file, bare) for pattern, bare in _OASIS_FILES for file in sorted(place.rglob(pattern))]
        if not found:
            raise ValueError(f"{place} holds none of {', '.join(pattern for pattern, _ in _OASIS_FILES)}")
        file, bare = found[0]
        subject = place.name.rsplit("_", 1)[0]
        stripping = Stripping(stripped=bare or options.stripped)
        scans.append(Scan(place.name, (file,), subject, labels[place.name], stripping))
    if not scans:
        raise ValueError(f"{tables[0]} tells {column} of none of the sessions in {folder}")
    return Cohort(scans, "OASIS-1", _left_out(without, f"sessions without {column}"))


def _class_folders(folder: Path, options: ScanOptions) -> Cohort:
    classes = folders_in(folder)
    while len(classes) == 1 and folders_in(classes[0]):
        classes = folders_in(classes[0])
    if len(classes) < 2:
        raise ValueError(
            f"{folder} holds volumes, but no class folders, no participants.tsv and no table of OASIS-1. Sort them "
            "into one folder a class, for example CN/ and AD/; to ask about single scans use python -m utils predict"
        )
    groups = [(place, own) for place in classes for own in _heads(place)]
    paths = [own[0].relative_to(folder).as_posix() for _, own in groups]
    numbers = {place.name: number for number, place in enumerate(classes)}
    named = find_ids(paths, [numbers[place.name] for place, _ in groups], {place.name for place in classes})
    ids = named.subject.tolist() if named and not named.guessed else [UNKNOWN] * len(paths)
    scans = []
    for (place, own), path, subject in zip(groups, paths, ids):
        name = re.sub(r"\.(nii(\.gz)?|hdr|mgz|mgh)$", "", path if len(own) == 1 else Path(path).parent.as_posix())
        plain = re.sub(r"[^\w.-]+", "_", name)
        who = f"patient{subject + 1:04d}" if subject != UNKNOWN else plain
        scans.append(Scan(plain, tuple(own), who, place.name, Stripping(stripped=options.stripped)))
    if not named or named.guessed:
        note = ["No names tell the patients: each scan was taken for a person of its own."]
        return Cohort(scans, "class folders", note, named=False)
    return Cohort(scans, "class folders", [f"Patients by {named.origin}.", *named.notes])


def _heads(place: Path) -> list[list[Path]]:
    """The volumes below a folder, and its series, a folder of DICOM files each."""
    volumes: list[list[Path]] = []
    series: dict[Path, list[Path]] = {}
    for file in sorted(files_in(place)):
        if is_volume(file):
            volumes.append([file])
        elif is_dicom(file) and file.name != "DICOMDIR":
            series.setdefault(file.parent, []).append(file)
    return [*volumes, *series.values()]


def _labels(path: Path, people: pd.DataFrame, key: str, options: ScanOptions) -> dict[str, str]:
    """Name -> class of everybody with one.

    Raises:
        ValueError: no such column, a value outside the map, or a name with two classes.
    """
    known = {column.lower(): column for column in people.columns}
    wanted = [options.label_column] if options.label_column else list(_LABEL_COLUMNS)
    column = next((known[name.lower()] for name in wanted if name.lower() in known), None)
    if column is None:
        raise ValueError(
            f"{path} has no column {' or '.join(wanted)}; name one of {', '.join(people.columns)} with --label-column"
        )
    mapping = options.mapping
    told = [(who, _plain(value)) for who, value in zip(people[key], people[column]) if value.lower() not in _NOTHING]
    values = dict(told)
    odd = sorted({value for value in values.values() if mapping and value not in {_plain(own) for own in mapping}})
    if odd:
        raise ValueError(
            f"{path}: {column} is {odd[0]!r} for {Counter(values.values())[odd[0]]} people, which --label-map does not "
            f"name (it names {', '.join(mapping)}); {odd[0]}=- leaves them out"
        )
    names = {_plain(value): name for value, name in mapping.items()}
    twice = [who for who, count in Counter(who for who, _ in set(told)).items() if count > 1]
    if twice:
        raise ValueError(f"{path} gives {twice[0]} two values of {column}; keep one row a person")
    chosen = {who: str(names.get(value, value)) for who, value in values.items()}
    return {who: check_class_name(name, str(path)) for who, name in chosen.items() if name != _NOBODY}


def _plain(value: str) -> str:
    """``1.0`` and ``1`` are one value."""
    try:
        return f"{float(value):g}"
    except ValueError:
        return value


def _left_out(names: list[str], what: str) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return [f"{len(names)} {what} were left out: {', '.join(names[:_MOST_NAMED])}{more}."]
