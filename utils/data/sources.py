"""Find and verify raw images with their classes: folders, archives, Kaggle handles and phantoms alike."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from utils.core.checks import whole
from utils.data.archives import ARCHIVE_SUFFIXES, DATA_SOURCES, PHANTOMS, as_folder, is_system
from utils.data.class_traces import traces
from utils.data.classes import CLASSES, canonical_class, chosen_order, class_order, severity
from utils.data.decode import SMALLEST_SIDE, decode_all
from utils.data.folders import files_in, folders_in, is_image
from utils.data.labelled import LabelledTable, as_class_folders, find_table
from utils.data.raw_images import RawImages
from utils.data.scans.cohort import Cohort, ScanOptions, find_cohort
from utils.data.scans.cutting import cut_cohort
from utils.data.subject_ids import numbered
from utils.data.tables import class_folders

_SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_SPLIT_WORD = re.compile("(?<![a-z])(train(ing)?|test(ing)?|val(id|idation)?)(?![a-z])")
_CONTENT_FOLDERS = {"data", "image", "images", "img", "imgs", "slices", "label", "labels", "mask", "masks"}
_TABLES = (".csv", ".tsv", ".xlsx", ".xls", ".json")
#: What else scans are kept in, and how to make slices of it.
_OTHER_FORMATS = {
    "MINC or NRRD volumes": ((".mnc", ".nrrd"), "Save them as NIfTI (nibabel or SimpleITK read them), sorted"),
    "arrays": (
        (".npy", ".npz", ".h5", ".hdf5", ".mat", ".tfrecord", ".pkl"),
        "Write the images that they hold as PNG files",
    ),
    "images in another format": (
        (".gif", ".jp2", ".heic", ".svg"),
        "Save them as PNG",
    ),
    "archives inside": (ARCHIVE_SUFFIXES, "Unpack them"),
}
_LARGEST_SIDE = 4096
#: More folders than this are patients or scans, not classes.
_MOST_CLASSES = 20
#: Share of images filed under two classes beyond which it is no slip but another meaning of the folders.
_MOST_CONFLICTS = 0.1


def load_source(
    source: str | Path,
    *,
    size: int | None = None,
    classes: Sequence[str] | None = None,
    scans: ScanOptions | None = None,
    scans_folder: Path | None = None,
) -> RawImages:
    """Load every image of a source as grey uint8, in path order.

    16-bit images are scaled by the lowest and highest value of all of them, colour becomes luma,
    transparent pixels lie on black, and EXIF orientation is applied; ``notes`` and ``info`` say so.

    Args:
        source: a folder of class folders; a folder with ``train/``, ``test/`` and perhaps
            ``validation/`` of class folders; a ``.tar``, ``.tar.xz`` or ``.zip`` of either; a Parquet table, or
            a folder of them (see :mod:`utils.data.tables`); a CSV of paths and labels, or a folder with one beside
            its images (see :mod:`utils.data.labelled`);
            ``kaggle``, a name of ``DATA_SOURCES`` or a Kaggle handle ``owner/data-set``; or
            ``phantom`` or ``phantom-t2`` (see :mod:`utils.data.phantom`). A class folder may hold a folder a patient.
            Where there are whole heads instead of slices, see :mod:`utils.data.scans.cohort`.
        size: store squares of this side; None keeps the native resolution.
        classes: the order of the labels, by names of folders or of ``CLASSES``; None orders by
            severity where all names are known, else by the alphabet.
        scans: how whole heads are read; None takes the defaults.
        scans_folder: where the slices of whole heads are kept, so that a later run need not cut them again; None
            keeps nothing.

    Raises:
        ModuleNotFoundError: a library that this source needs is missing; the message says how to install it.
        FileNotFoundError: no such folder, file or data set.
        ValueError: no class folders, an empty class, one class only, a layout that is not read,
            unreadable images, more than a few pictures filed under two classes, other ``classes``
            than there are, or an archive that is not safe to unpack. The message names the path.
    """
    if size is not None:
        whole("size", size, SMALLEST_SIDE, _LARGEST_SIDE)
    if str(source) in PHANTOMS:
        return _phantoms(size, classes, PHANTOMS[str(source)])
    with as_folder(source) as (place, ignored), class_folders(place) as own, ExitStack() as stack:
        table = find_table(own)
        if table:
            folder, people = stack.enter_context(as_class_folders(table))
            return _of_table(table, folder, people, _source_name(source), size=size, classes=classes)
        cohort = find_cohort(own, scans or ScanOptions()) if own.is_dir() else None
        if cohort:
            kept = scans_folder or Path(stack.enter_context(TemporaryDirectory()))
            return _of_heads(cohort, scans or ScanOptions(), kept, _source_name(source), size=size, classes=classes)
        given = [name for name, said in _scan_options(scans) if said]
        if given:
            raise ValueError(f"{', '.join(given)}: for whole heads (NIfTI, Analyze, DICOM), and {source} holds slices")
        try:
            raw = _load_folder(own, name=_source_name(source), size=size, classes=classes)
        except ValueError as error:
            # the path of an archive or table says more than that of the folder it was unpacked into
            raise ValueError(str(error).replace(str(own), str(source))) from error
        _note_ignored(raw, own, ignored)
    return raw


def _scan_options(scans: ScanOptions | None) -> list[tuple[str, bool]]:
    """Each option of whole heads, and whether somebody gave another value than it has."""
    own, usual = scans or ScanOptions(), ScanOptions()
    names = (entry.name for entry in fields(ScanOptions))
    return [(f"--{name.replace('_', '-')}", getattr(own, name) != getattr(usual, name)) for name in names]


def _of_table(
    table: LabelledTable,
    folder: Path,
    people: Mapping[str, str],
    name: str,
    *,
    size: int | None,
    classes: Sequence[str] | None,
) -> RawImages:
    """The images of a table, with their patients where it names them."""
    try:
        raw = _load_folder(folder, name=name, size=size, classes=classes)
    except ValueError as error:
        raise ValueError(str(error).replace(str(folder), str(table.root))) from error
    raw.notes.append(f"The classes stand in the table {table.file.name}.")
    without = sum(map(is_image, files_in(table.root))) - sum(map(is_image, files_in(folder)))
    if without > 0:
        raw.notes.append(f"{without} images in {table.root} stand in no row of it and were left out.")
    if people:
        named = numbered([people[path] for path in raw.paths], f"the table {table.file.name}")
        raw.subjects, raw.subjects_from = named.subject, named.origin
        raw.notes += named.notes
    return raw


def _of_heads(
    cohort: Cohort,
    options: ScanOptions,
    kept: Path,
    name: str,
    *,
    size: int | None,
    classes: Sequence[str] | None,
) -> RawImages:
    """The slices of whole heads, with their patients."""
    folder, notes = cut_cohort(cohort, options, kept)
    raw = _load_folder(folder, name=name, size=size, classes=classes)
    # CLASS/PATIENT/SCAN_NN.png
    named = numbered([path.split("/")[1] for path in raw.paths], f"the {cohort.kind} of the scans")
    raw.subjects, raw.subjects_from, raw.subjects_guessed = named.subject, named.origin, not cohort.named
    raw.notes = [*notes, *named.notes, *raw.notes]
    raw.info["scans"] = {"modality": options.modality, "plane": options.plane, "slices": options.slices}
    return raw


def _phantoms(size: int | None, classes: Sequence[str] | None, contrast: str) -> RawImages:
    from utils.data.phantom import PhantomConfig, make_phantoms

    order = chosen_order(CLASSES, classes)
    raw = make_phantoms(PhantomConfig(contrast=contrast), size=size)
    position = np.array([order.index(name) for name in raw.classes])
    return replace(raw, labels=position[raw.labels], classes=order)


def _source_name(source: str | Path) -> str:
    name = Path(source).name.lower()
    for suffix in sorted(ARCHIVE_SUFFIXES, key=len, reverse=True):
        name = name.removesuffix(suffix)
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_") or "images"


def _load_folder(folder: Path, *, name: str, size: int | None, classes: Sequence[str] | None) -> RawImages:
    class_folders, notes = _find_class_folders(folder)
    order = chosen_order(class_order({canonical_class(path.name) for _, path in class_folders}), classes)
    rows = sorted(
        (file.relative_to(folder).as_posix(), canonical_class(path.name), split)
        for split, path in class_folders
        for file in files_in(path)
    )
    paths = [row[0] for row in rows]
    _check_names(folder, paths)
    decoded = decode_all(folder, paths, size)
    labels = np.array([order.index(row[1]) for row in rows], dtype=np.int64)
    folders = [row[2] for row in rows]
    said = [*notes, *decoded.notes, *traces(decoded.traits, labels, order)]
    raw = RawImages(decoded.pixels, labels, paths, order, folders, name, notes=said, info=decoded.info)
    raw = _without_conflicts(raw, folder)
    raw.name = _recognise(raw) or name
    return raw


def _without_conflicts(raw: RawImages, folder: Path) -> RawImages:
    """Leave out pictures that lie in two classes: which label is right cannot be known here."""
    members = defaultdict(list)
    for index, picture in enumerate(raw.pixels):
        members[hashlib.sha256(picture).digest()].append(index)
    groups = [group for group in members.values() if len(set(raw.labels[group].tolist())) > 1]
    if not groups:
        return raw
    kept = np.ones(len(raw), dtype=bool)
    kept[np.concatenate(groups)] = False
    count = int((~kept).sum())
    shown = "; ".join(" and ".join(raw.paths[index] for index in group[:3]) for group in groups[:5])
    emptied = set(raw.labels.tolist()) - set(raw.labels[kept].tolist())
    if count > _MOST_CONFLICTS * len(raw) or emptied:
        raise ValueError(
            f"{folder}: {count} of {len(raw)} images are the same pictures in different classes, such as {shown}. "
            "Which label is right cannot be seen here: remove the wrong copies and run this again."
        )
    note = f"{count} images were left out, since the same picture lies in different classes: {shown}."
    return replace(
        raw,
        pixels=raw.pixels[kept],
        labels=raw.labels[kept],
        paths=[path for path, keep in zip(raw.paths, kept) if keep],
        folders=[split for split, keep in zip(raw.folders, kept) if keep],
        notes=[*raw.notes, note],
        info=raw.info | {"conflicting_images": count},
    )


def _note_ignored(raw: RawImages, folder: Path, unpacked_without: int) -> None:
    ignored = _ignored_files(folder)
    if ignored or unpacked_without:
        raw.info["ignored_files"] = len(ignored) + unpacked_without
    images = [path for path in ignored if is_image(path) and path.name[0] != "." and not is_system(path.parts)]
    if images:
        raw.notes.append(
            f"{len(images)} images in folders that begin with _ or a dot, such as {images[0].as_posix()}, were ignored."
        )


def _ignored_files(root: Path) -> list[Path]:
    """Hidden and system files, and all in folders whose names begin with a dot or underscore."""
    found = []
    for place, _, names in os.walk(root):
        folders = Path(place).relative_to(root).parts
        passed_over = any(part[0] in "._" for part in folders)
        found += [Path(*folders, name) for name in names if passed_over or name[0] == "." or is_system([name])]
    return sorted(found)


def _find_class_folders(root: Path) -> tuple[list[tuple[str, Path]], list[str]]:
    """Pairs of split folder (or nothing) and class folder, and notes about what was passed over."""
    _refuse_other_formats(root)
    folder = root
    children = folders_in(folder)
    while len(children) == 1 and not files_in(children[0], deep=False):
        folder = children[0]
        children = folders_in(folder)
    beside = [folder]
    if any(_SPLIT_FOLDERS.get(child.name.lower()) == "train" for child in children):
        pairs = _split_folders(root, children)
        beside += children
    else:
        pairs = [("", child) for child in children]
    _check_class_folders(root, pairs)
    loose = [file for place in beside for file in files_in(place, deep=False) if is_image(file)]
    if not loose:
        return pairs, []
    note = f"{len(loose)} images beside the class folders, such as {loose[0].name}, have no class: ignored."
    return pairs, [note]


def _refuse_other_formats(root: Path) -> None:
    """Name what a source holds where it is more of what is not read than of images."""
    files = sorted(files_in(root))
    if sum(map(is_image, files)) > len(files) / 2:
        return
    held = {name: [f for f in files if f.name.lower().endswith(ends)] for name, (ends, _) in _OTHER_FORMATS.items()}
    name = max(held, key=lambda name: len(held[name]))
    if len(held[name]) <= sum(map(is_image, files)):
        return
    raise ValueError(
        f"{root} holds {len(held[name])} {name}, such as {held[name][0].relative_to(root).as_posix()}, which are not "
        f"read. {_OTHER_FORMATS[name][1]} into one folder a class, for example CN/ and AD/, and give their parent."
    )


def _split_folders(root: Path, children: list[Path]) -> list[tuple[str, Path]]:
    names = [_SPLIT_FOLDERS.get(child.name.lower()) for child in children]
    unknown = [child.name for child, name in zip(children, names) if name is None]
    if unknown or len(set(names)) < len(names):
        odd = ", ".join(unknown) or ", ".join(child.name for child in children)
        raise ValueError(f"{root}: expected one train and one test folder beside each other, but there are also {odd}")
    return [(name, path) for name, child in zip(names, children) if name for path in folders_in(child)]


def _check_class_folders(root: Path, pairs: list[tuple[str, Path]]) -> None:
    splits = {split: [path for s, path in pairs if s == split] for split in sorted({split for split, _ in pairs})}
    for folders in splits.values():
        _check_nesting(root, folders)
    _refuse_table(root, pairs)
    empty = [str(path) for _, path in pairs if not files_in(path)]
    if len(empty) == len(pairs):
        raise ValueError(
            f"{root} has no class folders with images; expected one a class, for example Non_Demented/, "
            "Very_Mild_Demented/, Mild_Demented/, Moderate_Demented/"
        )
    if empty:
        raise ValueError(f"class folder without images: {', '.join(empty)}. Fill or remove it.")
    _check_class_names(root, {split: [path.name for path in folders] for split, folders in splits.items()})


def _check_class_names(root: Path, folder_names: dict[str, list[str]]) -> None:
    """The same classes in each split, each once, two at least, and not as many as patients."""
    classes = {split: [canonical_class(name) for name in names] for split, names in folder_names.items()}
    doubled = [name for names in classes.values() for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise ValueError(f"{root}: two folders mean the same class {doubled[0]}; merge them")
    if len(set(map(frozenset, classes.values()))) > 1:
        raise ValueError(f"{root}: its splits have different classes: {classes}")
    names = next(iter(classes.values()))
    if len(names) < 2:
        raise ValueError(f"{root} holds one class only ({names[0]}); a classifier needs two")
    if len(names) > _MOST_CLASSES:
        raise ValueError(
            f"{root} holds {len(names)} folders, such as {names[0]}: too many for classes. If they are patients, "
            "sort them into one folder a class."
        )


def _check_nesting(root: Path, folders: list[Path]) -> None:
    """A class folder may hold patient folders, but neither classes nor what others hold too."""
    held = {path: {child.name for child in folders_in(path)} for path in folders}
    plain = Counter(name for names in held.values() for name in names if not _has_number(name))
    shared = sorted(name for name, count in plain.items() if count > 1)
    alike = len(folders) > 1 and len({frozenset(names) for names in held.values()}) == 1
    if alike and len(held[folders[0]]) > 1:
        shared = sorted(held[folders[0]])
    if len(shared) > 1 or any(severity(name) is not None for name in shared):
        raise ValueError(
            f"{root}: {_listed([path.name for path in folders])} would be the classes, but they hold the same folders "
            f"({_listed(shared)}). Give one of them as source, or, if they are the set's own splits, call them "
            "train/, validation/ and test/."
        )
    nested = [path for path in folders if any(severity(n) is not None for n in held[path] if not _has_number(n))]
    if nested:
        raise ValueError(f"{nested[0]} should be a class folder but holds class folders; give that folder as source")
    splits = [path.name for path in folders if _SPLIT_WORD.search(path.name.lower())]
    if splits:
        raise ValueError(
            f"{root}: {_listed(splits)} would be a class, but is called like a split. Splits are folders train/, "
            "validation/ and test/ with one folder a class in each."
        )


def _has_number(name: str) -> bool:
    """Whether a folder's name has digits, as those of patients do; numbers in front only sort, as in ``0_Non``."""
    return bool(re.search(r"\d", re.sub(r"^\d+[ _.-]+(?=\D+$)", "", name)))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _refuse_table(root: Path, pairs: list[tuple[str, Path]]) -> None:
    """Say what to do with images whose classes stand in a table beside them, or nowhere."""
    content = sorted({path.name for _, path in pairs if path.name.lower() in _CONTENT_FOLDERS})
    files = sorted(files_in(root))
    tables = [file.relative_to(root).as_posix() for file in files if file.suffix.lower() in _TABLES]
    if not (content or (tables and len(pairs) < 2)) or not any(map(is_image, files)):
        return
    where = f" in {_listed([name + '/' for name in content])}" if content else ""
    table = f" and the table {tables[0]}" if tables else ""
    raise ValueError(
        f"{root} holds images{where}{table}, but no class folders. Sort the images into one folder a class, for "
        "example CN/ and AD/; where a table names the patients too, give prepare a CSV with the columns "
        "path,subject as --subjects."
    )


def _check_names(folder: Path, paths: list[str]) -> None:
    for path in paths:
        if not path.isprintable():
            raise ValueError(f"{folder}: the file name {path!r} has characters that no table can hold; rename it")


def _recognise(raw: RawImages) -> str | None:
    counts = {name: int((raw.labels == i).sum()) for i, name in enumerate(raw.classes)}
    return next((key for key, known in DATA_SOURCES.items() if known.class_counts == counts), None)
