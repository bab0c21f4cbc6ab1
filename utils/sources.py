"""Find, verify and decode raw images: folders, archives, Kaggle handles and phantoms alike."""

from __future__ import annotations

import os
import re
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

#: Dementia stages by severity. Every label, table and confusion matrix uses this order.
CLASSES = ("Non", "VeryMild", "Mild", "Moderate")

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}
_ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.xz", ".tar.gz", ".tgz", ".tar.bz2")
_SYSTEM_FILES = {"thumbs.db", "desktop.ini"}
_SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_LARGEST_SIDE = 4096


@dataclass(frozen=True)
class DataSource:
    """What is publicly known of a data set: where to get it and what must be in it."""

    title: str
    kaggle: str
    n_images: int
    class_counts: dict[str, int]
    n_subjects: int
    n_synthetic: int
    n_duplicates: int

    @property
    def url(self) -> str:
        """Page of the data set, with its licence."""
        return f"https://www.kaggle.com/datasets/{self.kaggle}"


#: Data sets known by name. Counts are of the images as published.
DATA_SOURCES = {
    "alzheimer_mri": DataSource(
        title="Alzheimer MRI Preprocessed Dataset",
        kaggle="sachinkumar413/alzheimer-mri-dataset",
        n_images=6400,
        class_counts={"Non": 3200, "VeryMild": 2240, "Mild": 896, "Moderate": 64},
        n_subjects=200,
        n_synthetic=0,
        n_duplicates=0,
    ),
    "best_alzheimer_mri": DataSource(
        title="Best Alzheimer MRI Dataset",
        kaggle="lukechugh/best-alzheimer-mri-dataset-99-accuracy",
        n_images=11519,
        class_counts={"Non": 3200, "VeryMild": 3008, "Mild": 2739, "Moderate": 2572},
        n_subjects=200,
        n_synthetic=4937,
        n_duplicates=182,
    ),
}


@dataclass
class RawImages:
    """Decoded images in path order.

    Attributes:
        pixels: uint8 array N x H x W, grey, 0..255.
        labels: int64 array N, indices into ``classes``.
        paths: N paths relative to the source, with forward slashes.
        classes: class names in label order.
        folders: N entries, ``"train"``, ``"test"`` or ``""`` where the source has no such folders.
        name: short name of the source.
        subjects: int64 array N where the source itself names the patients, else None.
        notes: what a reader should know about the decoding, one sentence each.
        info: plain values that go into every record made from these images.
    """

    pixels: np.ndarray
    labels: np.ndarray
    paths: list[str]
    classes: tuple[str, ...]
    folders: list[str]
    name: str
    subjects: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)
    info: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)


def load_source(source: str | Path, *, size: int | None = None) -> RawImages:
    """Load every image of a source as grey uint8, in path order.

    Args:
        source: a folder of class folders; a folder with ``train/`` and ``test/`` of class folders;
            a ``.tar``, ``.tar.xz`` or ``.zip`` of either; ``kaggle``, a name of ``DATA_SOURCES``
            or a Kaggle handle ``owner/data-set``; or ``phantom`` (see :mod:`utils.phantom`).
        size: store squares of this side; None keeps the native resolution.

    Raises:
        FileNotFoundError: no such folder, file or data set.
        ValueError: no class folders, an empty class, one class only, unreadable images, or an
            archive with members outside its own folder. The message names the path.
    """
    if size is not None and not 16 <= size <= _LARGEST_SIDE:
        raise ValueError(f"size must be 16 to {_LARGEST_SIDE} pixels, not {size}")
    if str(source) == "phantom":
        from utils.phantom import make_phantoms

        return make_phantoms(size=size)
    with _as_folder(source) as folder:
        try:
            return _load_folder(folder, name=_source_name(source), size=size)
        except ValueError as error:
            # an archive's own path says more than that of the folder it was unpacked into
            raise ValueError(str(error).replace(str(folder), str(source))) from error


def _source_name(source: str | Path) -> str:
    name = Path(source).name.lower()
    for suffix in sorted(_ARCHIVE_SUFFIXES, key=len, reverse=True):
        name = name.removesuffix(suffix)
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_") or "images"


@contextmanager
def _as_folder(source: str | Path) -> Iterator[Path]:
    path = Path(source).expanduser()
    if str(source) and path.is_dir():
        yield path
    elif path.is_file():
        with tempfile.TemporaryDirectory(prefix="mri_") as target:
            _extract(path, Path(target))
            yield Path(target)
    else:
        yield _download(str(source))


def kaggle_handle(source: str) -> str:
    """The Kaggle handle that a source means which is no path here.

    Raises:
        FileNotFoundError: it means none.
    """
    name = "best_alzheimer_mri" if source == "kaggle" else source
    handle = DATA_SOURCES[name].kaggle if name in DATA_SOURCES else name.removeprefix("kaggle:")
    mistyped = (
        "/" in source
        and not source.startswith("kaggle:")
        and Path(source).parts[:1]
        and Path(Path(source).parts[0]).exists()
    )
    if mistyped or not re.fullmatch(r"[\w-]+/[\w-]+", handle):
        raise FileNotFoundError(
            f"{source} is neither a folder, an archive, a Kaggle handle (owner/data-set), one of "
            f"{sorted(DATA_SOURCES)}, nor 'phantom'. Check the spelling, or use --source phantom "
            "to try everything without data."
        )
    return handle


def check_source(source: str | Path) -> None:
    """Raise FileNotFoundError, without reading or downloading anything, if ``source`` can mean nothing."""
    if str(source) != "phantom" and not Path(source).expanduser().exists():
        kaggle_handle(str(source))


def _download(source: str) -> Path:
    handle = kaggle_handle(source)
    import kagglehub

    try:
        return Path(kagglehub.dataset_download(handle))
    except Exception as error:
        raise FileNotFoundError(
            f"{source} is not a path here, and Kaggle did not deliver it ({error}). Download "
            f"https://www.kaggle.com/datasets/{handle} in a browser and give the path of the "
            "archive or folder as --source."
        ) from error


def _extract(archive: Path, target: Path) -> None:
    if not archive.name.lower().endswith(_ARCHIVE_SUFFIXES):
        raise ValueError(f"{archive} is not a folder nor one of {', '.join(_ARCHIVE_SUFFIXES)}")
    try:
        if archive.name.lower().endswith(".zip"):
            _extract_zip(archive, target)
        else:
            _extract_tar(archive, target)
    except (_UnsafeArchive, tarfile.FilterError) as error:
        raise ValueError(
            f"{archive} is not safe to unpack: {error}. Get the archive from its original place again."
        ) from error
    except Exception as error:  # a damaged archive makes the decompressors raise almost anything
        raise ValueError(f"{archive} could not be unpacked: {error}") from error


class _UnsafeArchive(Exception):
    pass


def _extract_zip(archive: Path, target: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            member.filename = member.filename.replace("\\", "/")
            _refuse_escape(member.filename)
            opened.extract(member, target)


def _extract_tar(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as opened:
        for name in opened.getnames():
            _refuse_escape(name)
        # tarfile takes a broken header for the end of the archive; the real end is all zeros
        opened.fileobj.seek(opened.offset)
        end = opened.fileobj.read()
        if len(end) < tarfile.BLOCKSIZE or any(end):
            raise tarfile.ReadError("it is damaged or cut short")
        opened.extractall(target, filter="data")


def _refuse_escape(member: str) -> None:
    parts = member.replace("\\", "/").split("/")
    if member.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
        raise _UnsafeArchive(f"its member {member!r} would land outside the target folder")


def _load_folder(folder: Path, *, name: str, size: int | None) -> RawImages:
    class_folders, notes = _find_class_folders(folder)
    classes = _class_order({canonical_class(path.name) for _, path in class_folders})
    rows = sorted(
        (file.relative_to(folder).as_posix(), canonical_class(path.name), split)
        for split, path in class_folders
        for file in _files(path)
    )
    paths = [row[0] for row in rows]
    _check_names(folder, paths)
    pixels, resized = _stack(_decode_all(folder, paths), size)
    labels = np.array([classes.index(row[1]) for row in rows], dtype=np.int64)
    raw = RawImages(pixels, labels, paths, classes, [row[2] for row in rows], name, notes=notes + resized)
    raw.name = _recognise(raw) or name
    return raw


def _find_class_folders(root: Path) -> tuple[list[tuple[str, Path]], list[str]]:
    """Pairs of split folder (or nothing) and class folder, and notes about what was passed over."""
    folder = root
    children = _folders(folder)
    while len(children) == 1 and not _files(children[0], deep=False):
        folder = children[0]
        children = _folders(folder)
    notes = []
    if any(_SPLIT_FOLDERS.get(child.name.lower()) == "train" for child in children):
        pairs = _split_folders(root, children)
    else:
        pairs = [("", child) for child in children]
    _check_class_folders(root, pairs)
    if any(split == "validation" for split, _ in pairs):
        notes.append("The validation folder was taken as part of the train folder.")
        pairs = [("train" if split == "validation" else split, path) for split, path in pairs]
    loose = [file for file in _files(folder, deep=False) if file.suffix.lower() in _IMAGE_SUFFIXES]
    if loose:
        notes.append(f"{len(loose)} images beside the class folders, such as {loose[0].name}, have no class: ignored.")
    return pairs, notes


def _split_folders(root: Path, children: list[Path]) -> list[tuple[str, Path]]:
    names = [_SPLIT_FOLDERS.get(child.name.lower()) for child in children]
    unknown = [child.name for child, name in zip(children, names) if name is None]
    if unknown or len(set(names)) < len(names):
        odd = ", ".join(unknown) or ", ".join(child.name for child in children)
        raise ValueError(f"{root}: expected one train and one test folder beside each other, but there are also {odd}")
    return [(name, path) for name, child in zip(names, children) for path in _folders(child)]


def _check_class_folders(root: Path, pairs: list[tuple[str, Path]]) -> None:
    example = "for example Non_Demented/, Very_Mild_Demented/, Mild_Demented/, Moderate_Demented/"
    if not pairs or not any(_files(path) for _, path in pairs):
        raise ValueError(f"{root} has no class folders with images; expected one a class, {example}")
    empty = [str(path) for _, path in pairs if not _files(path)]
    if empty:
        raise ValueError(f"class folder without images: {', '.join(empty)}. Fill or remove it.")
    nested = [str(path) for _, path in pairs if {canonical_class(c.name) for c in _folders(path)} & set(CLASSES)]
    if nested:
        raise ValueError(f"{nested[0]} should be a class folder but holds class folders; give that folder as source")
    classes = {}
    for split in sorted({split for split, _ in pairs}):
        names = [canonical_class(path.name) for s, path in pairs if s == split]
        doubled = [name for name, count in Counter(names).items() if count > 1]
        if doubled:
            raise ValueError(f"{root}: two folders mean the same class {doubled[0]}; merge them")
        classes[split] = set(names)
    if len(set(map(frozenset, classes.values()))) > 1:
        raise ValueError(f"{root}: train and test have different classes: {classes}")
    if len(names) < 2:
        raise ValueError(f"{root} holds one class only ({names[0]}); a classifier needs two")


def _folders(folder: Path) -> list[Path]:
    return [child for child in sorted(folder.iterdir()) if child.is_dir() and child.name[0] not in "._"]


def _files(folder: Path, *, deep: bool = True) -> list[Path]:
    """Files that are meant, links followed; an unreadable folder or a broken link is an error."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        # a folder that links to one above it would never end
        folders[:] = [f for f in folders if not Path(place).resolve().is_relative_to((Path(place) / f).resolve())]
        folders[:] = [f for f in folders if f[0] not in "._"] if deep else []
        found += [Path(place) / name for name in names if name[0] not in "._" and name.lower() not in _SYSTEM_FILES]
    return found


def _raise(error: OSError) -> None:
    raise ValueError(f"{error.filename} cannot be read: {error.strerror}. Check its permissions.") from error


def _check_names(folder: Path, paths: list[str]) -> None:
    for path in paths:
        if not path.isprintable():
            raise ValueError(f"{folder}: the file name {path!r} has characters that no table can hold; rename it")


def canonical_class(folder_name: str) -> str:
    """The name of ``CLASSES`` that a folder name means, or the folder name itself.

    >>> canonical_class("Very_Mild_Demented"), canonical_class("No Impairment")
    ('VeryMild', 'Non')
    """
    key = re.sub(r"[^a-z]", "", folder_name.lower())
    key = re.sub(r"(demented|dementia|impairment|impaired)$", "", key)
    known = {"no": "Non", **{name.lower(): name for name in CLASSES}}
    return known.get(key, folder_name)


def _class_order(names: set[str]) -> tuple[str, ...]:
    if names <= set(CLASSES):
        return tuple(name for name in CLASSES if name in names)
    return tuple(sorted(names))


def _decode_all(folder: Path, paths: list[str]) -> list[np.ndarray]:
    """Decode with a few threads; PIL releases the interpreter lock while it works."""
    bad: list[str] = []

    def decode(path: str) -> np.ndarray | None:
        try:
            return decode_grey(folder / path)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            bad.append(f"{path} ({error})")
            return None

    with ThreadPoolExecutor(max_workers=4) as pool:
        progress = tqdm(pool.map(decode, paths), total=len(paths), desc="decode", leave=False)
        pictures = list(progress)
    if bad:
        shown = "; ".join(sorted(bad)[:5])
        raise ValueError(
            f"{len(bad)} of {len(paths)} files under {folder} are not readable JPEG or PNG images: "
            f"{shown}. Replace or remove them, then run this again."
        )
    return pictures


def decode_grey(path: Path) -> np.ndarray:
    """One image as a uint8 H x W array, 0..255; 16-bit PNGs are scaled, colour is averaged to luma.

    Raises:
        OSError, ValueError: the file is no complete JPEG or PNG.
    """
    if path.suffix.lower() not in _IMAGE_SUFFIXES:
        raise ValueError("the name ends in none of .jpg .jpeg .png")
    with Image.open(path, formats=("JPEG", "PNG")) as image:
        if image.mode.startswith("I"):
            return (np.asarray(image, dtype=np.uint32) >> 8).astype(np.uint8)
        return np.asarray(image.convert("L"))


def _stack(pictures: list[np.ndarray], size: int | None) -> tuple[np.ndarray, list[str]]:
    shapes = Counter(picture.shape for picture in pictures)
    shape = (size, size) if size else shapes.most_common(1)[0][0]
    notes = []
    if len(shapes) > 1:
        notes.append(f"{len(shapes)} image sizes were found; all were fitted into {shape[0]}x{shape[1]}.")
    pixels = np.empty((len(pictures), *shape), dtype=np.uint8)
    for index, picture in enumerate(pictures):
        pixels[index] = picture if picture.shape == shape else _letterbox(picture, shape)
    return pixels, notes


def _letterbox(picture: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Fit into ``shape`` with the aspect ratio kept and black borders."""
    scale = min(shape[0] / picture.shape[0], shape[1] / picture.shape[1])
    height, width = (max(1, round(scale * side)) for side in picture.shape)
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)
    canvas = np.zeros(shape, dtype=np.uint8)
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    canvas[top : top + height, left : left + width] = resized
    return canvas


def _recognise(raw: RawImages) -> str | None:
    counts = {name: int((raw.labels == i).sum()) for i, name in enumerate(raw.classes)}
    return next((key for key, known in DATA_SOURCES.items() if known.class_counts == counts), None)
