"""Images whose classes stand in a table beside them, put before the reader as class folders."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import NoReturn

import pandas as pd

from utils.data.classes import check_class_name
from utils.data.folders import files_in, folders_in, is_image
from utils.data.subject_ids import PATH_COLUMNS, SUBJECT_COLUMNS, is_missing
from utils.data.text_tables import read_text_table

_ENDINGS = (".csv", ".tsv")
_PATHS = (*PATH_COLUMNS, "filepath", "image_id", "id")
_LABELS = ("label", "class", "diagnosis", "dx", "group", "target")


@dataclass(frozen=True)
class LabelledTable:
    """A table of images: its file, where the paths start, and path, label and perhaps subject of each row."""

    file: Path
    root: Path
    rows: pd.DataFrame


def find_table(place: Path) -> LabelledTable | None:
    """The table that names the classes of a folder's images; None where folders do so, or no table does.

    Raises:
        ValueError: several tables do, or ``place`` is a table that does not.
    """
    if place.is_file() and place.suffix.lower() in _ENDINGS:
        return _read(place, place.parent) or _refuse(place)
    if place.is_file():
        return None
    images = [folder for folder in folders_in(place) if any(map(is_image, files_in(folder)))]
    files = [file for file in files_in(place, deep=False) if file.suffix.lower() in _ENDINGS]
    loose = any(is_image(file) for file in files_in(place, deep=False))
    if not files or (len(images) > 1 and not loose):
        return None
    found = [table for table in (_read(file, place) for file in sorted(files)) if table]
    if len(found) > 1:
        raise ValueError(f"{place} holds two tables of paths and labels, {found[0].file.name} and {found[1].file.name}")
    return found[0] if found else None


@contextmanager
def as_class_folders(table: LabelledTable) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder with a folder a class of links to the table's images, and the patient of each path in it.

    What follows the class in a path is the image's own path. Where the table names no patients, none is told.

    Raises:
        ValueError: an image that is not there, lies elsewhere or could be several, one without a class or a patient, or
            with two.
    """
    if table.rows["label"].nunique() < 2:
        raise ValueError(f"{table.file} names one class only; a classifier needs two")
    by_name = defaultdict(list)
    for file in files_in(table.root):
        if is_image(file):
            by_name[file.name].append(file)
    named = "subject" in table.rows
    with TemporaryDirectory(prefix="mri_") as target:
        seen: dict[Path, tuple[str, str]] = {}
        people: dict[str, str] = {}
        for number, row in enumerate(table.rows.to_dict("records"), start=2):
            where = f"{table.file}, line {number}:"
            image = _image(table, row["path"], by_name, where)
            label, subject = check_class_name(row["label"], where), row.get("subject", "")
            if named and is_missing(subject):
                raise ValueError(f"{where} {row['path']} has no patient; write -1 for an image of nobody")
            if (other := seen.setdefault(image, (label, subject))) != (label, subject):
                raise ValueError(f"{where} {row['path']} is of {' '.join(other)} and of {' '.join((label, subject))}")
            place = Path(label) / image.relative_to(table.root)
            _link(image, Path(target) / place)
            if named:
                people[place.as_posix()] = subject
        yield Path(target), people


def _refuse(file: Path) -> NoReturn:
    columns = ", ".join(read_text_table(file).columns)
    raise ValueError(
        f"{file} is no table of images and classes: it needs a column {' or '.join(_PATHS[:4])} and a column "
        f"{' or '.join(_LABELS[:3])}, and has {columns}"
    )


def _read(file: Path, root: Path) -> LabelledTable | None:
    try:
        table = read_text_table(file)
    except ValueError:
        return None
    names = {str(column).lower(): column for column in table.columns}
    columns = {
        key: next((names[name] for name in known if name in names), None)
        for key, known in (("path", _PATHS), ("label", _LABELS), ("subject", SUBJECT_COLUMNS))
    }
    if columns["path"] is None or columns["label"] is None:
        return None
    chosen = {key: column for key, column in columns.items() if column is not None}
    rows = table[list(chosen.values())].set_axis(list(chosen), axis=1)
    rows["path"] = rows["path"].str.replace("\\", "/", regex=False).str.removeprefix("./")
    return LabelledTable(file, root, rows)


def _image(table: LabelledTable, path: str, by_name: dict[str, list[Path]], where: str) -> Path:
    """The image that a row means: its path from the root, or the one file that ends so, with or without an ending.

    Of a path that is whole, as on the machine where the table was made, what lies below the root counts.
    """
    if ".." in path.split("/"):
        raise ValueError(f"{where} the image {path} lies outside {table.root}; name it from there")
    told = path
    if _is_whole(path):
        path = _below(table.root, path) or path.rsplit("/", 1)[-1]
    whole = table.root / path
    if whole.is_file() and is_image(whole):
        return whole
    name = path.rsplit("/", 1)[-1]
    candidates = by_name.get(name) or [file for files in by_name.values() for file in files if file.stem == name]
    fitting = [file for file in candidates if f"/{path}" in (file.as_posix()[-len(path) - 1 :], _bare(file, path))]
    if not fitting and told != path:
        raise ValueError(f"{where} the image {told} lies outside {table.root}; name it from there")
    if len(fitting) != 1:
        wrong = "is not there" if not fitting else f"could be {fitting[0]} or {fitting[1]}"
        raise ValueError(f"{where} the image {told} {wrong}")
    return fitting[0]


def _is_whole(path: str) -> bool:
    """Whether a path begins at a root or a drive, of this system or of Windows."""
    return PureWindowsPath(path).drive != "" or PurePosixPath(path).is_absolute()


def _below(root: Path, path: str) -> str | None:
    """The longest end of a path at which an image lies below the root; None where there is none."""
    parts = path.split("/")
    ends = ("/".join(parts[start:]) for start in range(1, len(parts)))
    return next((end for end in ends if (root / end).is_file() and is_image(root / end)), None)


def _bare(file: Path, path: str) -> str:
    return file.with_suffix("").as_posix()[-len(path) - 1 :]


def _link(image: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return
    try:
        target.symlink_to(image.resolve())
    except OSError:  # a system that does not let everybody link
        shutil.copyfile(image, target)
