"""What somebody wants answered: a slice, a folder of slices, volumes or DICOM series, each a case by itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.data.archives import ARCHIVE_SUFFIXES, as_folder
from utils.data.decode import decode_slice, fit_into
from utils.data.folders import files_in, is_dicom, is_image
from utils.data.phantom import PhantomConfig, make_phantoms
from utils.data.scans.dicom import display_range, read_header, read_series, read_slice, series_in
from utils.data.scans.standard import PoorScan, Stripping, standardise
from utils.data.scans.volume import Volume, is_volume, read_volume
from utils.data.subject_ids import UNKNOWN, find_ids, id_in

PHANTOM = "phantom"
#: A real head, Colin27, where Debian's package mricron-data puts it.
HEAD = Path("/usr/share/mricron/templates/ch2.nii.gz")
FITS = ("pad", "stretch")


@dataclass(frozen=True)
class Reading:
    """How cases are read.

    Attributes:
        shape: height and width of the slices that the model knows.
        fit: ``pad`` keeps a picture's aspect ratio and puts black beside it, ``stretch`` does not.
        together: all slices of a folder are one patient's, in the order of their names.
        stripping, modality: of volumes, see :func:`utils.data.scans.standard.standardise`.
    """

    shape: tuple[int, int]
    fit: str = "pad"
    together: bool = False
    stripping: Stripping = field(default_factory=Stripping)
    modality: str = "T1"

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"fit must be one of {', '.join(FITS)}, not {self.fit!r}")


@dataclass
class Case:
    """Slices that get one answer.

    Attributes:
        name: for files and tables.
        images: uint8 S x 1 x H x W, in the order of the patient's slices.
        files: where they came from.
        whole: a patient's slices, so that the answer is a patient's and not a slice's.
        notes: what a reader should know, one sentence each.
        facts: what the preparation of a volume measured; plain values.
        pictures: what its steps left, title -> float H x W.
        problem: why there is nothing to answer; then ``images`` is empty.
    """

    name: str
    images: torch.Tensor
    files: list[str]
    whole: bool
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    problem: str = ""


def example_scan() -> str:
    """What is shown to those who name no scan: a whole real head where it can be read, else the word ``phantom``."""
    readable = HEAD.is_file() and all(map(find_spec, ("nibabel", "SimpleITK", "nilearn", "deepbet")))
    return str(HEAD) if readable else PHANTOM


def read_cases(
    source: str | Path, reading: Reading, *, say: Callable[[str], object] = lambda sentence: None
) -> Iterator[Case]:
    """The cases of a file, a folder, an archive, or the word ``phantom``, one after the other.

    A single file that cannot be read is an error; in a folder it is a case with a ``problem``.

    Args:
        say: told how many files were passed over, and which is the first.

    Raises:
        FileNotFoundError: no such path.
        ModuleNotFoundError: a library of ``env/requirements-scans.txt`` is missing.
        ValueError: a single file that is not readable, or a folder without anything to read.
    """
    if str(source) == PHANTOM:
        yield _phantom(reading)
        return
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a slice, a volume, a folder, or the word {PHANTOM}")
    if path.is_file() and not path.name.lower().endswith(ARCHIVE_SUFFIXES):
        yield _one(path, reading)
        return
    with as_folder(path) as (folder, unpacked_not):
        found = False
        if unpacked_not:
            say(f"passed over: {unpacked_not} system files of {path.name}")
        for case in _of_folder(folder, reading, say):
            found = True
            yield case
        if not found:
            raise ValueError(f"{path} holds no slice, no volume and no DICOM file")


def _one(path: Path, reading: Reading) -> Case:
    if is_volume(path):
        return _of_volume(read_volume(path), [path.name], reading)
    if path.suffix.lower() == ".img" and path.with_suffix(".hdr").is_file():
        return _one(path.with_suffix(".hdr"), reading)
    if is_dicom(path):
        return _of_dicom([path], path.stem, reading)
    if is_image(path):
        return _of_slices([path], path.stem, reading)
    raise ValueError(f"{path} is no picture (PNG, JPEG, TIFF, BMP, WebP), no NIfTI or Analyze volume and no DICOM file")


def _of_folder(folder: Path, reading: Reading, say: Callable[[str], object]) -> Iterator[Case]:
    files = sorted(files_in(folder), key=_natural)
    pictures = [file for file in files if is_image(file)]
    volumes = [file for file in files if is_volume(file)]
    others = [file for file in files if file not in set(pictures) | set(volumes)]
    places: dict[Path, list[Path]] = {}
    passed: list[Path] = []
    for file in others:
        if is_dicom(file) and file.name != "DICOMDIR":
            places.setdefault(file.parent, []).append(file)
        elif not (file.suffix.lower() == ".img" and file.with_suffix(".hdr") in volumes):
            passed.append(file)
    if passed:
        say(f"passed over: {len(passed)} without a scan, such as {passed[0].relative_to(folder)}")
    for name, own in _patients(folder, pictures, reading).items():
        yield _caught(name, own, lambda own=own, name=name: _of_slices(own, name, reading, whole=len(own) > 1))
    for name, file in zip(_unlike(folder, volumes), volumes):
        yield _caught(name, [file], lambda file=file: _one(file, reading))
    for place, own in places.items():
        name = _name(folder, place) if place != folder else folder.name
        yield from _series(name, own, reading)


def _series(name: str, files: list[Path], reading: Reading) -> Iterator[Case]:
    try:
        series = series_in(files)
    except ValueError as error:
        yield unreadable(name, files, error)
        return
    for number, own in enumerate(series.values(), start=1):
        label = name if len(series) == 1 else f"{name} series {number}"
        yield _caught(label, own, lambda own=own, label=label: _of_dicom(own, label, reading))


def _caught(name: str, files: Sequence[Path], read: Any) -> Case:
    try:
        case: Case = read()
    except (OSError, ValueError) as error:
        return unreadable(name, files, error)
    case.name = name
    return case


def unreadable(name: str, files: Sequence[Path], error: Exception) -> Case:
    """A case of which nothing can be answered, and why."""
    empty = torch.zeros((0, 1, 1, 1), dtype=torch.uint8)
    pictures = error.pictures if isinstance(error, PoorScan) else {}
    whole = len(files) > 1 or is_volume(files[0])
    return Case(name, empty, [file.name for file in files], whole, pictures=pictures, problem=str(error))


def _patients(folder: Path, pictures: list[Path], reading: Reading) -> dict[str, list[Path]]:
    """Name -> slices of each patient whom names tell; every other slice is a case of its own."""
    if not pictures:
        return {}
    if reading.together:
        return {folder.name: pictures}
    paths = [file.relative_to(folder).as_posix() for file in pictures]
    named = find_ids(paths, [0] * len(paths))
    names = _unlike(folder, pictures)
    if named is None or named.guessed:
        return {name: [file] for name, file in zip(names, pictures)}
    people: dict[int, str] = {}
    found: dict[str, list[Path]] = {}
    for file, name, path, subject in zip(pictures, names, paths, named.subject.tolist()):
        label = name if subject == UNKNOWN else people.setdefault(subject, id_in(path) or f"patient {subject + 1}")
        found.setdefault(label, []).append(file)
    return found


def _unlike(folder: Path, files: Sequence[Path]) -> list[str]:
    """Names of files, with their endings where two are alike but for these."""
    names = [_name(folder, file) for file in files]
    counts = Counter(name.lower() for name in names)
    return [
        file.relative_to(folder).as_posix() if counts[name.lower()] > 1 else name for name, file in zip(names, files)
    ]


def _of_slices(files: Sequence[Path], name: str, reading: Reading, *, whole: bool = False) -> Case:
    if reading.stripping.mask:
        raise ValueError(f"a mask marks the brain of a volume, and {files[0]} is a picture; leave --mask out")
    notes: list[str] = []
    slices = [_fitted(_picture(file, notes), reading, notes) for file in files]
    images = torch.from_numpy(np.stack(slices))[:, None]
    return Case(name, images, [file.name for file in files], whole, list(dict.fromkeys(notes)))


def _picture(file: Path, notes: list[str]) -> np.ndarray:
    try:
        picture = decode_slice(file)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{file} is not a readable picture ({error})") from error
    if picture.coloured:
        notes.append("The picture has colours; an MRI slice has none. Its luma was taken.")
    if picture.transparent:
        notes.append("The picture has transparent pixels; they were laid on black.")
    return picture.pixels


def _fitted(pixels: np.ndarray, reading: Reading, notes: list[str]) -> np.ndarray:
    if pixels.shape != reading.shape:
        height, width = reading.shape
        same = pixels.shape[0] * width == pixels.shape[1] * height
        how = "" if same else ", with black beside it" if reading.fit == "pad" else ", stretched"
        notes.append(
            f"The picture has {pixels.shape[1]} x {pixels.shape[0]} pixels; it was fitted into {width} x {height}{how}."
        )
    if max(pixels.shape) < 0.5 * max(reading.shape):
        notes.append("That is less than half of the detail that the model was trained on: do not rely on the answer.")
    return fit_into(pixels, reading.shape, stretch=reading.fit == "stretch")


def _of_volume(volume: Volume, files: list[str], reading: Reading) -> Case:
    made = standardise(volume, stripping=reading.stripping, modality=reading.modality)
    slices = np.stack([fit_into(piece, reading.shape, stretch=True) for piece in made.slices])
    name = re.sub(r"\.(nii(\.gz)?|hdr|mgz|mgh)$", "", volume.name, flags=re.IGNORECASE)
    images = torch.from_numpy(slices)[:, None]
    seen = {"lowest, middle, highest slice, as models see them:\nthe back of the head above": _three(slices)}
    facts = made.facts | {"levels_mm": made.levels}
    return Case(name, images, files, True, made.notes, facts, made.pictures | seen)


def _three(slices: np.ndarray) -> np.ndarray:
    """The lowest, the middle and the highest of slices, side by side in [0, 1]."""
    return np.hstack([slices[0], slices[len(slices) // 2], slices[-1]]) / 255


def _of_dicom(files: list[Path], name: str, reading: Reading) -> Case:
    if len(files) == 1 and (pixels := _single(files[0])) is not None:
        kind = str(read_header(files[0]).get("Modality", "") or "MR")
        notes = [] if kind == "MR" else [f"The file says that it is {kind} and not MR: do not rely on the answer."]
        if display_range(read_header(files[0])) is None:
            notes.append("The file names no window: its darkest pixel was taken as black, its brightest as white.")
        images = torch.from_numpy(_fitted(pixels, reading, notes))[None, None]
        return Case(name, images, [files[0].name], False, notes)
    return _of_volume(read_series(files), [file.name for file in files], reading)


def _single(file: Path) -> np.ndarray | None:
    """The slice of a DICOM file; None where it holds several frames."""
    if int(read_header(file).get("NumberOfFrames", 1) or 1) > 1:
        return None
    return read_slice(file)


def _phantom(reading: Reading) -> Case:
    """The first of the drawn patients."""
    config = PhantomConfig(n_subjects=8)
    drawn = make_phantoms(config, size=reading.shape[0])
    images = torch.from_numpy(drawn.pixels[: config.n_levels])[:, None]
    return Case(PHANTOM, images, drawn.paths[: config.n_levels], True, ["A drawn phantom, not a brain."])


def _name(folder: Path, place: Path) -> str:
    relative = place.relative_to(folder).as_posix()
    return re.sub(r"\.(nii(\.gz)?|[a-z]{2,4})$", "", relative, flags=re.IGNORECASE)


def _natural(path: Path) -> list[Any]:
    """Order by numbers inside names: slice 2 comes before slice 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.as_posix())]
