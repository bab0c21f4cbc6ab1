"""Find, verify and decode raw images: folders, archives, Kaggle handles and phantoms alike."""

from __future__ import annotations

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
_SPLIT_FOLDERS = ("train", "test")


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
    if str(source) == "phantom":
        from utils.phantom import make_phantoms

        return make_phantoms(size=size)
    if size is not None and size < 16:
        raise ValueError(f"size must be at least 16 pixels, not {size}")
    with _as_folder(source) as folder:
        return _load_folder(folder, name=_source_name(source), size=size)


def _source_name(source: str | Path) -> str:
    name = Path(source).name.lower()
    for suffix in sorted(_ARCHIVE_SUFFIXES, key=len, reverse=True):
        name = name.removesuffix(suffix)
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_") or "images"


@contextmanager
def _as_folder(source: str | Path) -> Iterator[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        yield path
    elif path.is_file():
        with tempfile.TemporaryDirectory(prefix="mri_") as target:
            _extract(path, Path(target))
            yield Path(target)
    else:
        yield _download(str(source))


def _download(source: str) -> Path:
    name = "best_alzheimer_mri" if source == "kaggle" else source
    handle = DATA_SOURCES[name].kaggle if name in DATA_SOURCES else name.removeprefix("kaggle:")
    if not re.fullmatch(r"[\w-]+/[\w-]+", handle):
        raise FileNotFoundError(
            f"{source} is neither a folder, an archive, a Kaggle handle (owner/data-set), one of "
            f"{sorted(DATA_SOURCES)}, nor 'phantom'. Check the spelling, or use --source phantom "
            "to try everything without data."
        )
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
            with zipfile.ZipFile(archive) as opened:
                _refuse_escapes(archive, opened.namelist())
                opened.extractall(target)
        else:
            with tarfile.open(archive) as opened:
                _refuse_escapes(archive, opened.getnames())
                opened.extractall(target, filter="data")
    except tarfile.FilterError as error:
        raise ValueError(f"{archive} is not safe to unpack: {error}") from error
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"{archive} could not be unpacked: {error}") from error


def _refuse_escapes(archive: Path, members: list[str]) -> None:
    for member in members:
        parts = member.replace("\\", "/").split("/")
        if member.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
            raise ValueError(
                f"{archive} is not safe to unpack: its member {member!r} would land outside the "
                "target folder. Get the archive from its original place again."
            )


def _load_folder(folder: Path, *, name: str, size: int | None) -> RawImages:
    class_folders = _find_class_folders(folder)
    classes = _class_order({canonical_class(path.name) for _, path in class_folders})
    rows = sorted(
        (file.relative_to(folder).as_posix(), canonical_class(path.name), split)
        for split, path in class_folders
        for file in _files(path)
    )
    paths = [row[0] for row in rows]
    pictures = _decode_all(folder, paths)
    pixels, notes = _stack(pictures, size)
    labels = np.array([classes.index(row[1]) for row in rows], dtype=np.int64)
    raw = RawImages(pixels, labels, paths, classes, [row[2] for row in rows], name, notes=notes)
    raw.name = _recognise(raw) or name
    return raw


def _find_class_folders(root: Path) -> list[tuple[str, Path]]:
    folder = root
    while True:
        children = [c for c in sorted(folder.iterdir()) if c.is_dir() and c.name[0] not in "._"]
        by_name = {child.name.lower(): child for child in children}
        if all(split in by_name for split in _SPLIT_FOLDERS):
            pairs = [
                (split, path)
                for split in _SPLIT_FOLDERS
                for path in sorted(by_name[split].iterdir())
                if path.is_dir() and path.name[0] not in "._"
            ]
            break
        if len(children) == 1 and not _files(children[0], deep=False):
            folder = children[0]
            continue
        pairs = [("", child) for child in children]
        break
    _check_class_folders(root, pairs)
    return pairs


def _check_class_folders(root: Path, pairs: list[tuple[str, Path]]) -> None:
    example = "for example Non_Demented/, Very_Mild_Demented/, Mild_Demented/, Moderate_Demented/"
    if not pairs or not any(_files(path) for _, path in pairs):
        raise ValueError(f"{root} has no class folders with images; expected one a class, {example}")
    empty = [str(path) for _, path in pairs if not _files(path)]
    if empty:
        raise ValueError(f"class folder without images: {', '.join(empty)}. Fill or remove it.")
    for split in {split for split, _ in pairs}:
        names = [canonical_class(path.name) for s, path in pairs if s == split]
        doubled = [name for name, count in Counter(names).items() if count > 1]
        if doubled:
            raise ValueError(f"{root}: two folders mean the same class {doubled[0]}; merge them")
    names = {canonical_class(path.name) for _, path in pairs}
    if len(names) < 2:
        raise ValueError(f"{root} holds one class only ({names.pop()}); a classifier needs two")


def _files(folder: Path, *, deep: bool = True) -> list[Path]:
    found = folder.rglob("*") if deep else folder.iterdir()
    return [
        path for path in found if path.is_file() and path.name[0] not in "._" and path.name.lower() not in _SYSTEM_FILES
    ]


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
        except (OSError, ValueError, SyntaxError) as error:
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
