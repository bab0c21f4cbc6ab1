"""Image sets: plain tensors on disk and on the device, checked for leaks whenever they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from utils.core.parts import Part
from utils.core.paths import DATASET_VARIABLES, Writer, atomic_write_all
from utils.data.raw_images import RawImages
from utils.data.splits import SPLITS
from utils.data.subject_ids import UNKNOWN
from utils.data.subjects import Subjects

MANIFEST = "manifest.csv"
MANIFEST_COLUMNS = ["path", "label", "subject", "slice", "synthetic", "split"]
#: A last column where something is to be said of single images.
REMARKS = "note"
_REMEDY = (
    "Prepare the images: `python -m utils prepare --source PATH --split patient`, or dataset/prepare_dataset.ipynb."
)


@dataclass
class ImageSet:
    """One side of a split.

    Attributes:
        images: uint8 tensor N x 1 x H x W, grey, 0..255, native resolution.
        labels: int64 tensor N, indices into ``classes``.
        subjects: int64 tensor N, patient ids, -1 where unknown.
        slices: int64 tensor N, position in the patient's stack, -1 where unknown.
        synthetic: bool tensor N.
        paths: N paths relative to the source.
        classes: class names in label order.
        info: source, protocol, ratios, seed, and ``fingerprint`` of the whole split.
    """

    images: torch.Tensor
    labels: torch.Tensor
    subjects: torch.Tensor
    slices: torch.Tensor
    synthetic: torch.Tensor
    paths: list[str]
    classes: list[str]
    info: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: torch.Tensor) -> ImageSet:
        """The images at ``index`` (int64 tensor), in that order."""
        return ImageSet(
            self.images[index],
            self.labels[index],
            self.subjects[index],
            self.slices[index],
            self.synthetic[index],
            [self.paths[i] for i in index.tolist()],
            self.classes,
            self.info,
        )

    def pixels(self, index: torch.Tensor | slice, device: torch.device | str = "cpu") -> torch.Tensor:
        """Images as float32 in [0, 1] on ``device``. Shape n x 1 x H x W."""
        return self.images[index].to(device).float() / 255

    def batches(
        self, batch_size: int, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All images in order, as pairs of float images in [0, 1] and labels."""
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            yield self.pixels(part, device), self.labels[part].to(device)

    def balanced_subset(self, n: int, seed: int = 0) -> ImageSet:
        """At most ``n`` images, fixed by ``seed``, spread over patients as evenly as possible."""
        if n >= len(self):
            return self
        shuffled = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        taken: dict[int, int] = {}
        rank = {}
        for index in shuffled:
            patient = int(self.subjects[index])
            rank[index] = taken.get(patient, 0)
            taken[patient] = rank[index] + 1
        chosen = sorted(shuffled, key=rank.__getitem__)[:n]
        return self.subset(torch.tensor(sorted(chosen)))

    def join(self, other: ImageSet) -> ImageSet:
        """This set followed by another of the same classes and image size."""

        def both(name: str) -> torch.Tensor:
            return torch.cat([getattr(self, name), getattr(other, name)])

        return ImageSet(
            both("images"),
            both("labels"),
            both("subjects"),
            both("slices"),
            both("synthetic"),
            self.paths + other.paths,
            self.classes,
            self.info,
        )

    def table(self) -> pd.DataFrame:
        """Images and patients a class."""
        rows = []
        for label, name in enumerate(self.classes):
            own = self.labels == label
            known = self.subjects[own & (self.subjects != UNKNOWN)]
            rows.append({"class": name, "images": int(own.sum()), "patients": len(known.unique())})
        return pd.DataFrame(rows).set_index("class")


@dataclass
class DataSplits:
    """Train, validation and test of one protocol."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet

    @property
    def classes(self) -> list[str]:
        """Class names in label order."""
        return self.train.classes

    @property
    def info(self) -> dict:
        """Source, protocol, ratios, seed and fingerprint."""
        return self.train.info

    @property
    def fingerprint(self) -> str:
        """Identifies pixels, labels and patients of all three sides."""
        return self.info["fingerprint"]

    @property
    def everyone(self) -> ImageSet:
        """Copies of all images: train, validation and test one after the other."""
        return self.train.join(self.validation).join(self.test)

    def __iter__(self) -> Iterator[tuple[str, ImageSet]]:
        return iter((name, getattr(self, name)) for name in SPLITS)

    def table(self) -> pd.DataFrame:
        """Images and patients, a row a class, a column pair a side."""
        return pd.concat({name: part.table() for name, part in self}, axis=1)


def build_splits(raw: RawImages, subjects: Subjects, split: np.ndarray, info: dict) -> DataSplits:
    """Cut decoded images into the three sides named by ``split`` (str array N)."""
    parts = []
    for name in SPLITS:
        index = np.flatnonzero(split == name)
        parts.append(
            ImageSet(
                torch.from_numpy(raw.pixels[index])[:, None],
                torch.from_numpy(raw.labels[index]),
                torch.from_numpy(subjects.subject[index]),
                torch.from_numpy(subjects.slice[index]),
                torch.from_numpy(subjects.synthetic[index]),
                [raw.paths[i] for i in index],
                list(raw.classes),
                dict(info),
            )
        )
    splits = DataSplits(*parts)
    for _, part in splits:
        part.info["fingerprint"] = fingerprint(splits)
        part.info["shared_patients"] = shared_patients(splits)
    check_no_leak(splits)
    return splits


def resplit(splits: DataSplits, sides: np.ndarray, **info: object) -> DataSplits:
    """All images of ``splits`` on other sides.

    Args:
        sides: str array N over train, validation and test one after the other.
        info: entries to change.
    """
    everyone = splits.everyone
    parts = [everyone.subset(torch.from_numpy(np.flatnonzero(sides == name))) for name in SPLITS]
    again = DataSplits(*(replace(part, info=dict(part.info) | info) for part in parts))
    for _, part in again:
        part.info["fingerprint"] = fingerprint(again)
    check_no_leak(again)
    return again


def patients_verified(info: Mapping[str, Any]) -> bool:
    """Whether the patients of a split are named by its source or passed all checks.

    Sets that were prepared before these checks existed count as verified; only the two public ones were.
    """
    return bool(info.get("patients", {}).get("verified", True))


def shared_patients(splits: DataSplits) -> dict[str, int]:
    """How many patients the test side has, and how many of these training or validation have too; nobody is unknown."""
    test = set(splits.test.subjects.tolist()) - {UNKNOWN}
    others = {*splits.train.subjects.tolist(), *splits.validation.subjects.tolist()}
    return {"test": len(test), "shared": len(test & others)}


def protocol_name(info: Mapping[str, Any]) -> str:
    """``patient split`` and the like, for tables; says where its patients are unverified."""
    doubt = "" if patients_verified(info) else " (patients unverified)"
    return f"{info['protocol']} split{doubt}"


def data_note(info: Mapping[str, Any]) -> str:
    """What every figure and record of this data must say about its numbers, or nothing."""
    notes = []
    if info["source"] == "phantom":
        notes.append("phantom demo, no medical meaning")
    if info["protocol"] != "patient":
        notes.append(f"{info['protocol']} split: patients are on both sides, so this measures their recognition")
    elif not patients_verified(info):
        notes.append("patients unverified: the same people may be on both sides")
    return "; ".join(notes)


class DataFacts(Part):
    """What a record tells of the data it is of; see :attr:`DataSplits.info`."""

    source: str
    protocol: str
    fingerprint: str = ""

    @property
    def verified(self) -> bool:
        """See :func:`patients_verified`."""
        return patients_verified(self.plain())

    @property
    def split_name(self) -> str:
        """See :func:`protocol_name`."""
        return protocol_name(self.plain())


def fingerprint(splits: DataSplits) -> str:
    """SHA-256 over protocol, classes and all tensors of all sides, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, part in splits:
        digest.update(f"{name}{tuple(part.images.shape)}{part.classes}{part.info.get('protocol')}".encode())
        for tensor in (part.images, part.labels, part.subjects, part.slices, part.synthetic):
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def check_no_leak(splits: DataSplits) -> None:
    """Raise ValueError if a patient split has a patient or an image on two sides, or an image of no patient."""
    if splits.info.get("protocol") != "patient":
        return
    owner: dict[int, str] = {}
    seen: set[bytes] = set()
    for name, part in splits:
        own = {hashlib.sha256(image.numpy()).digest() for image in part.images}
        if own & seen:
            raise ValueError(f"{name} holds an image that another side holds too. {_REMEDY}")
        seen |= own
        for patient in part.subjects.unique().tolist():
            if patient == UNKNOWN:
                raise ValueError(f"{name} holds images of unknown patients. {_REMEDY}")
            if patient in owner:
                raise ValueError(f"patient {patient} is in {owner[patient]} and in {name}. {_REMEDY}")
            owner[patient] = name


def manifest(raw: RawImages, subjects: Subjects, split: np.ndarray) -> pd.DataFrame:
    """One row an image of the source; ``split`` is empty where the image was left out.

    Where images are in doubt, a last column ``note`` says why.
    """
    columns = {
        "path": raw.paths,
        "label": [raw.classes[label] for label in raw.labels],
        "subject": subjects.subject,
        "slice": subjects.slice,
        "synthetic": subjects.synthetic,
        "split": split,
    }
    table = pd.DataFrame(columns)[MANIFEST_COLUMNS]
    remarks = _remarks(subjects)
    return table.assign(**{REMARKS: remarks}) if any(remarks) else table


def _remarks(subjects: Subjects) -> list[str]:
    """What is to be said of each image."""
    nobody = (subjects.subject == UNKNOWN) & ~subjects.synthetic
    guessed = "patient unverified" if subjects.doubts else ""
    return ["no patient named" if unnamed else guessed for unnamed in nobody.tolist()]


def save_splits(splits: DataSplits, table: pd.DataFrame, out: Path) -> None:
    """Write ``{train,validation,test}_set.pt`` and ``manifest.csv``: all of them or none."""
    out = Path(out)
    writers: dict[Path, Writer] = {
        out / f"{name}_set.pt": partial(torch.save, _as_plain(part)) for name, part in splits
    }
    writers[out / MANIFEST] = lambda path: table.to_csv(path, index=False)
    atomic_write_all(writers)


def _as_plain(part: ImageSet) -> dict:
    return {entry.name: _plain(getattr(part, entry.name)) for entry in fields(part)}


def _plain(value: Any) -> Any:
    """``value`` with numbers of Python for those of numpy, which no file that is read without executing code holds."""
    if isinstance(value, dict):
        return {key: _plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(own) for own in value)
    return value.item() if isinstance(value, np.generic) else value


def load_splits(folder: str | Path = DATASET_VARIABLES) -> DataSplits:
    """Read what :func:`save_splits` wrote, and check it again.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the files do not belong together, or a patient is on two
            sides of a patient split. The message says what to run.
    """
    folder = Path(folder)
    splits = DataSplits(*(_load_part(folder / f"{name}_set.pt") for name in SPLITS))
    if any(part.info != splits.info for _, part in splits) or fingerprint(splits) != splits.info.get("fingerprint"):
        raise ValueError(f"the *_set.pt files in {folder} do not belong together. {_REMEDY}")
    check_no_leak(splits)
    _check_manifest(splits, load_manifest(folder / MANIFEST))
    return splits


def stored_source(folder: Path) -> str | None:
    """Source of the sets that a folder holds; None where it holds none that can be read."""
    path = Path(folder) / f"{SPLITS[-1]}_set.pt"
    try:
        return _load_part(path).info.get("source")
    except (FileNotFoundError, ValueError):
        return None


def _load_part(path: Path) -> ImageSet:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. {_REMEDY}")
    try:
        part = ImageSet(**torch.load(path, weights_only=True))
        per_image = (part.images, part.labels, part.subjects, part.slices, part.synthetic, part.paths)
        if {len(entry) for entry in per_image} != {len(part)} or part.images.dtype != torch.uint8:
            raise ValueError("its entries do not fit together")
        return ImageSet(**vars(part) | {"info": dict(part.info)})
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise ValueError(f"{path} is not a readable image set ({error}). {_REMEDY}") from error


def load_manifest(path: str | Path) -> pd.DataFrame:
    """Read ``manifest.csv``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a CSV with the columns of ``MANIFEST_COLUMNS``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. {_REMEDY}")
    try:
        text = dict.fromkeys(("path", "label", "split", REMARKS), str)
        table = pd.read_csv(path, keep_default_na=False, dtype=text)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable CSV ({error}). {_REMEDY}") from error
    if list(table.columns) not in (MANIFEST_COLUMNS, [*MANIFEST_COLUMNS, REMARKS]):
        raise ValueError(f"{path} has columns {list(table.columns)}, not {MANIFEST_COLUMNS}. {_REMEDY}")
    return table


def _check_manifest(splits: DataSplits, table: pd.DataFrame) -> None:
    for name, part in splits:
        rows = table[table["split"] == name]
        same = rows["path"].tolist() == part.paths and rows["subject"].tolist() == part.subjects.tolist()
        if not same or rows["label"].tolist() != [part.classes[i] for i in part.labels]:
            raise ValueError(f"{MANIFEST} and {name}_set.pt disagree. {_REMEDY}")
