"""From a head to the slices that the models know: even out the coil's shading, lay it on the template, cut it.

The public slices are OASIS-1's: gain-corrected, stripped, laid on an atlas by an affine transform, 176 x 208 pixels
squeezed to 128 x 128 and turned upside down. Where they lie was fitted with the mean slice of each level against the
template ICBM152, to whose voxels the mean slices then correlate by .957.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.extras import need
from utils.data.scans.brain import brain_ml, find_brain, given_brain, stripped_brain
from utils.data.scans.volume import Volume

SIDE = 128
#: Heights in mm above the template's origin at which the public slices lie.
LEVELS = tuple(range(-4, 28))
MODALITIES = ("T1", "T2", "FLAIR", "PET", "CT")
#: Least correlation with the template of a T1 image that lies well on it, and least overlap of the brains of any
#: (Dice, 1945). Measured: see ``benchmarks/scans.json``.
LEAST_CORRELATION, LEAST_OVERLAP = 0.87, 0.90
#: A turn of the head must be better by so much, at the coarse grid, before the file is believed to be wrong.
_TURN_MARGIN = 0.05
#: Percentile of the brain's intensities, and the grey level that it has in the public slices.
_BRIGHT_PERCENTILE, _BRIGHT_LEVEL = 99.5, 241.0
_LEAST_BRAIN = 0.05
_REGISTERED_MM = 2.0


@dataclass(frozen=True)
class Plane:
    """How slices of one plane are cut: directions of columns, rows and levels in right, front, top; mm a pixel; centre.

    Attributes:
        column, row, level: unit vectors.
        column_mm, row_mm: sides of a pixel.
        centre: of the slice at level 0, mm.
    """

    column: tuple[float, float, float]
    row: tuple[float, float, float]
    level: tuple[float, float, float]
    column_mm: float
    row_mm: float
    centre: tuple[float, float, float]
    first: float
    last: float


#: ``axial`` is that of the public slices; the others are for models of one's own.
PLANES = {
    "axial": Plane((1, 0, 0), (0, 1, 0), (0, 0, 1), 1.449, 1.722, (0, -17.1, 0), LEVELS[0], LEVELS[-1]),
    "coronal": Plane((1, 0, 0), (0, 0, -1), (0, 1, 0), 1.449, 1.449, (0, 0, 5), -40, 10),
    "sagittal": Plane((0, 1, 0), (0, 0, -1), (1, 0, 0), 1.722, 1.449, (0, -17.1, 5), -30, 30),
}


@dataclass(frozen=True)
class Cut:
    """Which slices are wanted.

    Attributes:
        plane: key of ``PLANES``.
        count: slices, evenly spaced from the plane's first level to its last.

    Raises:
        ValueError: another plane, or no slice.
    """

    plane: str = "axial"
    count: int = len(LEVELS)

    def __post_init__(self) -> None:
        if self.plane not in PLANES:
            raise ValueError(f"plane must be one of {', '.join(PLANES)}, not {self.plane!r}")
        if self.count < 1:
            raise ValueError(f"at least one slice must be cut, not {self.count}")

    @property
    def levels(self) -> list[float]:
        """Levels in mm."""
        plane = PLANES[self.plane]
        if self.count == 1:
            return [(plane.first + plane.last) / 2]
        return np.linspace(plane.first, plane.last, self.count).tolist()


@dataclass(frozen=True)
class Stripping:
    """How the brain is found: by deepbet, from ``mask``, or it is all that is left (``stripped``)."""

    mask: Path | None = None
    stripped: bool = False

    def brain(self, head: Volume) -> np.ndarray:
        """The brain, bool X x Y x Z."""
        if self.mask:
            return given_brain(head, self.mask)
        return stripped_brain(head) if self.stripped else find_brain(head)


class PoorScan(ValueError):
    """A head that cannot be used, with the pictures of the steps that led there."""

    def __init__(self, message: str, pictures: dict[str, np.ndarray]) -> None:
        super().__init__(message)
        self.pictures = pictures


@dataclass
class Standard:
    """Slices of one head at the places of the public ones.

    Attributes:
        slices: uint8 S x 128 x 128, from the lowest level to the highest.
        levels: mm.
        facts: brain volume, correlation and overlap with the template, transform; plain values for a record.
        notes: what a reader should know, one sentence each.
        pictures: what each step left, title -> middle slices, float H x W.
    """

    slices: np.ndarray
    levels: list[float]
    facts: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


def standardise(
    head: Volume, *, stripping: Stripping = Stripping(), cut: Cut = Cut(), modality: str = "T1", even: bool = True
) -> Standard:
    """The slices that the models know, of a whole head.

    Args:
        modality: one of ``MODALITIES``; only a T1 image is compared with the template by its intensities.
        even: correct the coil's shading (N4, Tustison et al., 2010).

    Raises:
        ModuleNotFoundError: a library of ``env/requirements-scans.txt`` is missing.
        ValueError: no brain, one of an impossible size, or one that does not lie on the template.
    """
    if modality not in MODALITIES:
        raise ValueError(f"modality must be one of {', '.join(MODALITIES)}, not {modality!r}")
    sitk = need("SimpleITK", "heads are laid on the template")
    brain = stripping.brain(head)
    size = brain_ml(head, brain)
    pictures = {"as read": middle(head.voxels), "brain": middle(np.where(brain, head.voxels, 0))}
    scan = as_image(head.with_voxels(np.where(brain, head.voxels - head.voxels[brain].min(), 0)))
    mask = as_image(head.with_voxels(brain.astype(np.float32)))
    if even and modality != "PET":
        scan = _evened(scan, mask)
        pictures["shading corrected"] = middle(sitk.GetArrayFromImage(scan).transpose(2, 1, 0))
    template = template_image()
    lies, notes = _turn(template, scan, mask, modality, doubtful=bool(head.notes))
    transform = register(template, scan, lies)
    facts = fit_of(template, scan, mask, transform)
    on_template = sitk.GetArrayFromImage(sitk.Resample(scan, template, transform, sitk.sitkLinear, 0.0))
    pictures["on the template"] = middle(on_template.transpose(2, 1, 0))
    pictures["template"] = middle(sitk.GetArrayFromImage(template).transpose(2, 1, 0))
    _check_fit(head.name, facts, modality, pictures)
    values = sitk.GetArrayFromImage(sitk.Resample(scan, grid(cut), transform, sitk.sitkLinear, 0.0))
    inside = sitk.GetArrayFromImage(sitk.Resample(mask, grid(cut), transform, sitk.sitkNearestNeighbor, 0.0)) > 0.5
    _check_slices(head.name, inside, cut, pictures)
    bright = float(np.percentile(values[inside], _BRIGHT_PERCENTILE))
    slices = np.rint(np.clip(values * (_BRIGHT_LEVEL / bright), 0, 255)).astype(np.uint8)
    told = {"brain_ml": round(size, 1), **facts, "modality": modality, "plane": cut.plane}
    return Standard(slices, cut.levels, told, [*head.notes, *notes], pictures)


def as_image(volume: Volume) -> Any:
    """A volume as SimpleITK holds it, whose axes count to the left and to the back."""
    sitk = need("SimpleITK", "heads are laid on the template")
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.voxels.transpose(2, 1, 0), dtype=np.float32))
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(sides.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / sides).ravel().tolist())
    return image


def template_image() -> Any:
    """The stripped T1 template ICBM152 (Fonov et al., 2011), which lies in nilearn's package."""
    nilearn = need("nilearn", "heads are laid on the template, which comes")
    nibabel = need("nibabel", "volumes are read")
    name = "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    image = nibabel.as_closest_canonical(nibabel.load(Path(nilearn.__file__).parent / "datasets" / "data" / name))
    return as_image(Volume("ICBM152", image.get_fdata(dtype=np.float32), np.asarray(image.affine, dtype=np.float64)))


def register(fixed: Any, moving: Any, start: Any) -> Any:
    """The affine transform under which two images tell most of each other (Mattes et al., 2003), from ``start`` on.

    Asked at voxels of about ``_REGISTERED_MM``; finer ones take twice the time for the same fit.
    """
    sitk = need("SimpleITK", "heads are laid on the template")
    search = sitk.ImageRegistrationMethod()
    search.SetMetricAsMattesMutualInformation(32)
    search.SetMetricSamplingStrategy(search.RANDOM)
    search.SetMetricSamplingPercentage(0.2, seed=1)
    search.SetInterpolator(sitk.sitkLinear)
    search.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, 200, relaxationFactor=0.5)
    search.SetOptimizerScalesFromPhysicalShift()
    search.SetShrinkFactorsPerLevel([2, 1])
    search.SetSmoothingSigmasPerLevel([2, 1])
    search.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    search.SetInitialTransform(start, inPlace=False)
    return search.Execute(_coarse(fixed), _coarse(moving))


def _coarse(image: Any) -> Any:
    sitk = need("SimpleITK", "heads are laid on the template")
    return sitk.BinShrink(image, [max(1, round(_REGISTERED_MM / side)) for side in image.GetSpacing()])


def fit_of(template: Any, scan: Any, mask: Any, transform: Any) -> dict[str, Any]:
    """Correlation of intensities, and overlap of brains, with the template; and the transform's twelve numbers."""
    sitk = need("SimpleITK", "heads are laid on the template")
    reference = sitk.GetArrayFromImage(template)
    own = sitk.GetArrayFromImage(sitk.Resample(scan, template, transform, sitk.sitkLinear, 0.0))
    brain = sitk.GetArrayFromImage(sitk.Resample(mask, template, transform, sitk.sitkNearestNeighbor, 0.0)) > 0.5
    overlap = 2 * (brain & (reference > 0)).sum() / max(brain.sum() + (reference > 0).sum(), 1)
    affine = sitk.AffineTransform(transform.GetNthTransform(0) if hasattr(transform, "GetNthTransform") else transform)
    told = [round(float(value), 5) for value in (*affine.GetMatrix(), *affine.GetTranslation(), *affine.GetCenter())]
    return {
        "correlation": round(correlation(own, reference), 4),
        "overlap": round(float(overlap), 4),
        "transform": told,
    }


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's, over all pixels; 0 where one of them is constant."""
    first, second = (values.astype(np.float64) - values.mean(dtype=np.float64) for values in (one, other))
    size = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum() / size) if size else 0.0


def grid(cut: Cut) -> Any:
    """Where the slices of a cut lie on the template, as an empty image of SimpleITK."""
    sitk = need("SimpleITK", "slices are cut")
    plane, levels = PLANES[cut.plane], cut.levels
    axes = np.array([plane.column, plane.row, plane.level], dtype=float).T
    step = levels[1] - levels[0] if len(levels) > 1 else 1.0
    half = (SIDE - 1) / 2
    corner = np.array(plane.centre) - axes @ np.array([half * plane.column_mm, half * plane.row_mm, -levels[0]])
    to_left_back = np.diag([-1.0, -1.0, 1.0])
    image = sitk.Image(SIDE, SIDE, len(levels), sitk.sitkFloat32)
    image.SetSpacing((plane.column_mm, plane.row_mm, step))
    image.SetOrigin((to_left_back @ corner).tolist())
    image.SetDirection((to_left_back @ axes).ravel().tolist())
    return image


def middle(voxels: np.ndarray) -> np.ndarray:
    """The three middle planes of X x Y x Z voxels side by side, top or front upwards, scaled to [0, 1]."""
    x, y, z = (length // 2 for length in voxels.shape)
    planes = [voxels[:, :, z].T[::-1], voxels[:, y, :].T[::-1], voxels[x, :, :].T[::-1]]
    height = max(plane.shape[0] for plane in planes)
    padded = [np.pad(plane, ((0, height - plane.shape[0]), (0, 0)), constant_values=voxels.min()) for plane in planes]
    row = np.concatenate(padded, axis=1).astype(np.float32)
    low, high = float(row.min()), float(np.percentile(row, 99.8))
    return np.clip((row - low) / max(high - low, 1e-6), 0, 1)


def _evened(scan: Any, mask: Any) -> Any:
    """N4 on every fourth voxel; the smooth field that it finds is taken from all of them."""
    sitk = need("SimpleITK", "shading is corrected")
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations([30, 30, 20])
    factors = [max(1, min(4, length // 16)) for length in scan.GetSize()]
    inside = sitk.Cast(mask > 0.5, sitk.sitkUInt8)
    n4.Execute(sitk.Shrink(scan, factors), sitk.Shrink(inside, factors))
    field_of = sitk.Exp(n4.GetLogBiasFieldAsImage(scan))
    return sitk.Cast(scan / field_of, sitk.sitkFloat32) * sitk.Cast(inside, sitk.sitkFloat32)


def _turn(template: Any, scan: Any, mask: Any, modality: str, *, doubtful: bool) -> tuple[Any, list[str]]:
    """A start for the registration: the brains' centres on each other, turned where the file does not say how.

    Raises:
        ValueError: the file says how the head lies, and it lies otherwise.
    """
    sitk = need("SimpleITK", "heads are laid on the template")
    outline = sitk.Cast(template > 0, sitk.sitkFloat32)
    fixed, moving = (template, scan) if modality == "T1" else (outline, mask)
    small = sitk.Shrink(sitk.SmoothingRecursiveGaussian(fixed, 4.0), [4, 4, 4])
    smooth = sitk.SmoothingRecursiveGaussian(moving, 4.0)
    reference = sitk.GetArrayFromImage(small)
    kind = sitk.CenteredTransformInitializerFilter.MOMENTS
    centred = sitk.AffineTransform(sitk.CenteredTransformInitializer(outline, mask, sitk.AffineTransform(3), kind))
    found = []
    for matrix in turns():
        turned = sitk.AffineTransform(centred)
        turned.SetMatrix(matrix.ravel().tolist())
        own = sitk.GetArrayFromImage(sitk.Resample(smooth, small, turned, sitk.sitkLinear, 0.0))
        found.append((correlation(own, reference), turned, matrix))
    straight, best = found[0], max(found, key=lambda entry: entry[0])
    if best[0] < straight[0] + _TURN_MARGIN:
        return straight[1], []
    if not doubtful:
        raise ValueError(
            f"the head does not lie as the file says: turned by {best[2].astype(int).tolist()} it would fit the "
            f"template better ({best[0]:.2f} against {straight[0]:.2f}). Correct the orientation in its header"
        )
    return best[1], ["The head was turned to lie as the template does; left and right may be exchanged."]


def turns() -> list[np.ndarray]:
    """The 24 rotations that lead axes to axes, the identity first."""
    found = []
    for order in permutations(range(3)):
        for signs in product((1.0, -1.0), repeat=3):
            matrix = np.zeros((3, 3))
            matrix[range(3), order] = signs
            if np.linalg.det(matrix) > 0:
                found.append(matrix)
    return sorted(found, key=lambda matrix: -np.trace(matrix))


def _check_fit(name: str, facts: dict[str, Any], modality: str, pictures: dict[str, np.ndarray]) -> None:
    poor = facts["overlap"] < LEAST_OVERLAP or (modality == "T1" and facts["correlation"] < LEAST_CORRELATION)
    if poor:
        raise PoorScan(
            f"{name} does not lie well on the template: correlation {facts['correlation']:.2f} (at least "
            f"{LEAST_CORRELATION} for T1), overlap of the brains {facts['overlap']:.2f} (at least {LEAST_OVERLAP}). Is "
            f"it a {modality} image of a whole head, and the skull off? Look at the picture of the steps",
            pictures,
        )


def _check_slices(name: str, inside: np.ndarray, cut: Cut, pictures: dict[str, np.ndarray]) -> None:
    empty = [f"{level:g} mm" for level, part in zip(cut.levels, inside) if part.mean() < _LEAST_BRAIN]
    if empty:
        told = ", ".join(empty[:5])
        raise PoorScan(f"{name} shows no brain at {told}: that part of the head was not scanned", pictures)
