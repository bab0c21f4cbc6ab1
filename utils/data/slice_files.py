"""Slices written as files that others read, and read back: 8- and 16-bit PNG, NIfTI, DICOM."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from utils.core.paths import atomic_write
from utils.data.extras import need

_DEEP = 65535


def write_slices(slices: np.ndarray, stem: Path, kind: str) -> list[Path]:
    """Write slices and return the files, in order.

    Args:
        slices: float S x H x W in [0, 1].
        stem: path without an ending.
        kind: key of ``KINDS``.

    Raises:
        ModuleNotFoundError: nibabel or pydicom is not installed.
        ValueError: another kind.
    """
    return _of(kind)[0](slices, stem)


def read_slices(files: list[Path], kind: str) -> np.ndarray:
    """What :func:`write_slices` wrote, float32 S x H x W in [0, 1], as exactly as the files hold it."""
    return _of(kind)[1](files).astype(np.float32)


def _of(kind: str) -> tuple[Callable, Callable]:
    if kind not in KINDS:
        raise ValueError(f"files are of the kinds {', '.join(KINDS)}, not {kind!r}")
    return KINDS[kind]


def _write_pngs(slices: np.ndarray, stem: Path, *, most: int) -> list[Path]:
    values = np.rint(np.clip(slices, 0, 1) * most).astype(np.uint16 if most > 255 else np.uint8)
    files = [_numbered(stem, number, len(slices), ".png") for number in range(len(slices))]
    for file, piece in zip(files, values):
        atomic_write(file, partial(Image.fromarray(piece).save, format="PNG"))
    return files


def _read_pngs(files: list[Path], *, most: int) -> np.ndarray:
    pieces = []
    for file in files:
        with Image.open(file) as image:
            pieces.append(np.asarray(image, dtype=np.float64) / most)
    return np.stack(pieces)


def _write_nifti(slices: np.ndarray, stem: Path) -> list[Path]:
    nibabel = need("nibabel", "NIfTI is written")
    image = nibabel.Nifti1Image(np.ascontiguousarray(slices.transpose(2, 1, 0), dtype=np.float32), np.eye(4))
    file = stem.with_name(stem.name + ".nii.gz")
    file.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, file)
    return [file]


def _read_nifti(files: list[Path]) -> np.ndarray:
    nibabel = need("nibabel", "NIfTI is read")
    return np.asarray(nibabel.load(files[0]).dataobj).transpose(2, 1, 0)


def _write_dicoms(slices: np.ndarray, stem: Path) -> list[Path]:
    pydicom = need("pydicom", "DICOM is written")
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    series, files = generate_uid(), []
    for number, piece in enumerate(np.rint(np.clip(slices, 0, 1) * _DEEP).astype("<u2")):
        meta = pydicom.dataset.FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = pydicom.dataset.Dataset()
        data.file_meta = meta
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.InstanceNumber, data.Modality = series, number + 1, "OT"
        data.SeriesDescription = "attacked slices, not for clinical use"
        data.Rows, data.Columns = piece.shape
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation = 15, 0
        data.PixelData = piece.tobytes()
        file = _numbered(stem, number, len(slices), ".dcm")
        file.parent.mkdir(parents=True, exist_ok=True)
        data.save_as(file, enforce_file_format=True)
        files.append(file)
    return files


def _read_dicoms(files: list[Path]) -> np.ndarray:
    pydicom = need("pydicom", "DICOM is read")
    return np.stack([pydicom.dcmread(file).pixel_array.astype(np.float64) / _DEEP for file in files])


def _numbered(stem: Path, number: int, count: int, ending: str) -> Path:
    return stem.with_name(stem.name + (f"_{number:02d}" if count > 1 else "") + ending)


#: Kind -> how slices are written as such, and read again.
KINDS: dict[str, tuple[Callable, Callable]] = {
    "png8": (partial(_write_pngs, most=255), partial(_read_pngs, most=255)),
    "png16": (partial(_write_pngs, most=_DEEP), partial(_read_pngs, most=_DEEP)),
    "nifti": (_write_nifti, _read_nifti),
    "dicom": (_write_dicoms, _read_dicoms),
}
