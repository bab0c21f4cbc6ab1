"""One head in three dimensions, as NIfTI, Analyze and FreeSurfer files hold it, checked before any long work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.extras import need

#: Names of files that hold a whole head; the header of an Analyze pair stands for both of its files.
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".mgz", ".mgh")
#: Voxels of the largest volume that is read; a small file may claim billions.
LARGEST_VOXELS = 512**3
#: Fewest voxels along an axis, and the lengths in mm between which a head's field of view lies.
FEWEST_VOXELS = 12
SHORTEST_MM, LONGEST_MM = 60.0, 500.0
#: Voxels farther apart than this cannot show a ventricle.
COARSEST_MM = 10.0


@dataclass(frozen=True)
class Volume:
    """A head.

    Attributes:
        name: of the file or series.
        voxels: float32 X x Y x Z; the axes lead to the patient's right, front and top (RAS).
        affine: float64 4 x 4, from voxel indices to mm in that order of axes.
        modality: what the file says it is, such as MR; empty where it does not say.
        notes: what a reader should know, one sentence each.
    """

    name: str
    voxels: np.ndarray
    affine: np.ndarray
    modality: str = ""
    notes: tuple[str, ...] = ()

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Lengths of a voxel's sides in mm."""
        first, second, third = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return first, second, third

    def with_voxels(self, voxels: np.ndarray) -> Volume:
        """Another content at the same place."""
        return Volume(self.name, voxels, self.affine, self.modality, self.notes)


def is_volume(path: Path) -> bool:
    """Whether a file's name says that it holds a volume; the ``.img`` of an Analyze pair counts by its ``.hdr``."""
    return path.name.lower().endswith(VOLUME_SUFFIXES)


def read_volume(path: Path) -> Volume:
    """A NIfTI, Analyze or FreeSurfer file.

    Raises:
        ModuleNotFoundError: nibabel is not installed.
        FileNotFoundError: no such file.
        ValueError: it is not whole, holds no single head, or its geometry cannot be; the message says what is wrong.
    """
    nibabel = need("nibabel", f"{path.name} is a volume, which is read")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        image = nibabel.load(path)
    except Exception as error:  # a damaged file makes nibabel raise almost anything
        raise ValueError(f"{path} is not a readable NIfTI, Analyze or FreeSurfer volume ({_first(error)})") from error
    shape = tuple(image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    check_shape(path, shape)
    if image.get_data_dtype().fields:
        raise ValueError(f"{path} has colours, not intensities; save the scan itself")
    _check_sides(path, image)
    affine = np.asarray(image.affine, dtype=np.float64)
    check_affine(path, affine, shape)
    try:
        image = nibabel.as_closest_canonical(image.slicer[..., 0] if len(image.shape) > 3 else image)
        voxels = image.get_fdata(dtype=np.float32, caching="unchanged").reshape(shape_of(image))
    except Exception as error:
        raise ValueError(f"{path} is not whole: its voxels cannot be read ({_first(error)})") from error
    check_voxels(path, voxels)
    return Volume(path.name, voxels, np.asarray(image.affine, dtype=np.float64), notes=_doubts(image))


def shape_of(image: Any) -> tuple[int, int, int]:
    """The three lengths of a volume, without trailing ones."""
    first, second, third = image.shape[:3]
    return first, second, third


def check_shape(path: Path, shape: tuple[int, ...]) -> None:
    """Raise ValueError where a volume of this shape is no head, before its voxels are read."""
    shown = " x ".join(map(str, shape))
    if len(shape) > 3:
        raise ValueError(f"{path} holds {shape[-1]} volumes ({shown}): save the one that is meant as a file of its own")
    if len(shape) < 3 or min(shape) < FEWEST_VOXELS:
        raise ValueError(f"{path} has {shown} voxels, but a head needs {FEWEST_VOXELS} along each of three axes")
    if np.prod(shape, dtype=np.float64) > LARGEST_VOXELS:
        raise ValueError(f"{path} claims {shown} voxels, more than the limit of {LARGEST_VOXELS:,}")


def check_affine(path: Path, affine: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise ValueError where the voxels of a head cannot lie so."""
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or sides.min() < 1e-3 or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise ValueError(f"{path} says that its voxels are {_by(sides)} mm large; correct its header")
    if sides.max() > COARSEST_MM:
        raise ValueError(f"{path} has voxels of {_by(sides)} mm; more than {COARSEST_MM:g} mm show no ventricle")
    lengths = sides * np.asarray(shape)
    if lengths.min() < SHORTEST_MM or lengths.max() > LONGEST_MM:
        raise ValueError(
            f"{path} shows {_by(lengths)} mm, but a whole head takes {SHORTEST_MM:g} to {LONGEST_MM:g} mm along each "
            "axis: part of it is missing, or the header's voxel size is wrong"
        )


def check_voxels(path: Path, voxels: np.ndarray) -> None:
    """Raise ValueError where there is nothing to see, or what is no number."""
    bad = int(voxels.size - np.isfinite(voxels).sum())
    if bad:
        raise ValueError(f"{path} has {bad:,} voxels that are NaN or infinite; save it with numbers, such as 0, there")
    if voxels.min() == voxels.max():
        raise ValueError(f"{path} is empty: all voxels are {voxels.min():g}")


def _check_sides(path: Path, image: Any) -> None:
    """Refuse sides of 0, which nibabel takes for 1 mm."""
    kind = type(image.header)
    if not hasattr(kind, "from_fileobj") or "pixdim" not in image.header:
        return
    with image.file_map.get("header", image.file_map["image"]).get_prepare_fileobj("rb") as file:
        sides = np.abs(kind.from_fileobj(file, check=False)["pixdim"][1:4])
    if not (np.isfinite(sides) & (sides > 0)).all():
        raise ValueError(f"{path} says that its voxels are {_by(sides)} mm large; correct its header")


def _doubts(image: Any) -> tuple[str, ...]:
    codes = [int(image.header[name]) for name in ("qform_code", "sform_code") if name in image.header]
    if any(codes) or type(image).__name__.startswith("MGH"):
        return ()
    return (
        "The file does not say how the head lies; it was taken to lie as its voxels are stored, left and right may "
        "be exchanged.",
    )


def _by(lengths: np.ndarray) -> str:
    return " x ".join(f"{length:.3g}" for length in lengths)


def _first(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
