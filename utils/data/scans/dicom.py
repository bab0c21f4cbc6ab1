"""DICOM: the slices of one series as a volume, and a single slice as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.extras import need
from utils.data.scans.volume import Volume, check_affine, check_shape, check_voxels

#: Positions of neighbouring slices may differ by so much of their distance.
_UNEVEN = 0.1
_WHY = "DICOM is read"


def series_in(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Series number -> its files that hold pictures.

    Raises:
        ModuleNotFoundError: pydicom is not installed.
        ValueError: a file is not readable, or none holds a picture.
    """
    found: dict[str, list[Path]] = {}
    for file in files:
        header = read_header(file)
        if "PixelData" in header:
            found.setdefault(str(header.get("SeriesInstanceUID", "")), []).append(file)
    if not found:
        where = files[0] if len(files) == 1 else files[0].parent
        raise ValueError(f"{where} holds DICOM without pixel data, such as a report or a plan, and no picture")
    return found


def read_series(files: Sequence[Path]) -> Volume:
    """The slices of one series, in the order of their places.

    Args:
        files: of one series; files without pixel data among them are passed over.

    Raises:
        ModuleNotFoundError: pydicom or SimpleITK is not installed.
        ValueError: several series, slices missing or at one place, or no whole head.
    """
    series = series_in(files)
    folder = files[0].parent
    if len(series) > 1:
        listed = "; ".join(f"{_described(read_header(own[0]))} ({len(own)} files)" for own in series.values())
        raise ValueError(
            f"{folder} holds {len(series)} series: {listed}. Put the one that is meant into a folder alone"
        )
    own = next(iter(series.values()))
    place = own[0] if len(own) == 1 else folder
    headers = {file: read_header(file) for file in own}
    ordered = own if len(own) == 1 else _in_order(folder, headers)
    voxels, affine = _assembled(place, ordered)
    voxels, affine = to_ras(voxels, affine)
    check_shape(place, voxels.shape)
    check_affine(place, affine, voxels.shape)
    check_voxels(place, voxels)
    first = headers[ordered[0]]
    return Volume(folder.name, voxels, affine, modality=str(first.get("Modality", "")))


def read_slice(file: Path) -> np.ndarray:
    """The picture of a file with a single slice, uint8 H x W, black and white as :func:`display_range` says.

    Raises:
        ModuleNotFoundError: pydicom is not installed.
        ValueError: no grey picture, or one that cannot be decoded.
    """
    need("pydicom", _WHY)
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    header = read_header(file)
    if "PixelData" not in header:
        raise ValueError(
            f"{file} holds no pixel data: it is a {header.get('Modality', 'DICOM')} file without a picture"
        )
    try:
        values = apply_voi_lut(apply_modality_lut(header.pixel_array, header), header).astype(np.float64)
    except Exception as error:
        raise ValueError(f"{file}: its pixel data cannot be decoded ({error})") from error
    if values.ndim != 2:
        raise ValueError(f"{file} holds pixels of shape {values.shape}, not one grey slice")
    if values.min() == values.max():
        raise ValueError(f"{file} is empty: all pixels are {values.min():g}")
    black, white = display_range(header) or (values.min(), values.max())
    grey = ((values - black) / (white - black)).clip(0, 1)
    if header.get("PhotometricInterpretation") == "MONOCHROME1":
        grey = 1 - grey
    return np.rint(255 * grey).astype(np.uint8)


def display_range(header: Any) -> tuple[float, float] | None:
    """Between which values a file says that its picture lies; None where it does not, and its own range is taken.

    It says so by a table or a window of values of interest, whose result fills the range of the stored bits (DICOM
    PS3.3, C.11.2), or where it is a picture of 8 bits that nothing rescales.
    """
    if "VOILUTSequence" in header:
        return 0.0, 2.0 ** int(header.VOILUTSequence[0].LUTDescriptor[2]) - 1
    bits, signed = int(header.get("BitsStored", 16)), int(header.get("PixelRepresentation", 0))
    slope, intercept = float(header.get("RescaleSlope", 1)), float(header.get("RescaleIntercept", 0))
    windowed = "WindowCenter" in header and "WindowWidth" in header and "ModalityLUTSequence" not in header
    whole = bits <= 8 and not signed and (slope, intercept) == (1.0, 0.0)
    if not windowed and not whole:
        return None
    low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)
    return low * slope + intercept, high * slope + intercept


def read_header(file: Path) -> Any:
    """All of a DICOM file but its pixels, which are read when they are asked for.

    Raises:
        ModuleNotFoundError: pydicom is not installed.
        ValueError: it is not readable.
    """
    pydicom = need("pydicom", _WHY)
    try:
        return pydicom.dcmread(file, defer_size=4096)
    except Exception as error:
        raise ValueError(f"{file} is not a readable DICOM file ({error})") from error


def to_ras(voxels: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Voxels whose axes lead to right, front and top, and their affine."""
    nibabel = need("nibabel", "volumes are turned")
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(voxels, affine))
    return np.ascontiguousarray(image.get_fdata(dtype=np.float32)), np.asarray(image.affine, dtype=np.float64)


def _in_order(folder: Path, headers: dict[Path, Any]) -> list[Path]:
    """Files from the first place to the last along the normal of their planes."""
    try:
        rows, columns = np.split(np.array(next(iter(headers.values())).ImageOrientationPatient, dtype=float), 2)
        normal = np.cross(rows, columns)
        places = {file: float(np.dot(header.ImagePositionPatient, normal)) for file, header in headers.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: the files do not say where their slices lie ({error})") from error
    ordered = sorted(places, key=places.__getitem__)
    steps = np.diff([places[file] for file in ordered])
    if steps.min() < 1e-3:
        pair = ordered[int(steps.argmin())].name, ordered[int(steps.argmin()) + 1].name
        raise ValueError(f"{folder}: {pair[0]} and {pair[1]} lie at one place; several echoes or times are mixed")
    if steps.max() - steps.min() > _UNEVEN * float(np.median(steps)):
        raise ValueError(
            f"{folder}: neighbouring slices lie {steps.min():.3g} to {steps.max():.3g} mm apart; slices are missing"
        )
    return ordered


def _assembled(place: Path, ordered: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Voxels X x Y x Z and their affine, both in the right-front-top order of axes that nibabel uses."""
    sitk = need("SimpleITK", _WHY)
    try:
        image = sitk.ReadImage([str(file) for file in ordered] if len(ordered) > 1 else str(ordered[0]))
    except RuntimeError as error:
        told = str(error).strip().split("\n")[-1]
        raise ValueError(f"{place}: the pixel data cannot be decoded ({told})") from error
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise ValueError(f"{place} has colours, not intensities; give the scan itself")
    voxels = sitk.GetArrayFromImage(image).astype(np.float32).transpose(2, 1, 0)
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return voxels, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM counts to the left and to the back


def _described(header: Any) -> str:
    return str(header.get("SeriesDescription") or header.get("SeriesNumber") or header.get("Modality", "without name"))
