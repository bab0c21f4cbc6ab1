"""Whole heads: what is read, what is refused by name, and the slices that come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import extra

nibabel = extra("nibabel")
pydicom = extra("pydicom")
sitk = extra("SimpleITK")
extra("nilearn")

from pydicom.dataset import FileDataset, FileMetaDataset  # noqa: E402 - an extra
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid  # noqa: E402

from utils.data.cases import Reading, read_cases  # noqa: E402
from utils.data.scans import standard  # noqa: E402
from utils.data.scans.brain import brain_ml, given_brain, stripped_brain  # noqa: E402
from utils.data.scans.dicom import read_series, read_slice  # noqa: E402
from utils.data.scans.standard import Cut, PoorScan, Stripping, as_image, correlation, standardise  # noqa: E402
from utils.data.scans.volume import Volume, read_volume  # noqa: E402

COLIN = Path("/usr/share/mricron/templates")


def _ramp(shape: tuple[int, ...] = (40, 44, 36)) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def _nifti(path: Path, voxels: np.ndarray, spacing: float = 4.0) -> Path:
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([spacing, spacing, spacing, 1])), path)
    return path


def _with_spacing_zero(path: Path) -> Path:
    _nifti(path, _ramp())
    content = bytearray(path.read_bytes())
    content[80:92] = bytes(12)  # pixdim 1 to 3
    content[252:256] = bytes(4)  # no qform, no sform
    content[280:328] = bytes(48)
    path.write_bytes(content)
    return path


def _truncated(path: Path) -> Path:
    _nifti(path, _ramp())
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def _claims_much(path: Path) -> Path:
    _nifti(path, _ramp())
    content = bytearray(path.read_bytes())
    content[42:48] = np.array([30_000, 30_000, 30_000], dtype="<i2").tobytes()
    path.write_bytes(content)
    return path


def _colours(path: Path) -> Path:
    pixels = np.zeros((40, 44, 36), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(pixels, np.diag([4.0, 4, 4, 1])), path)
    return path


def _nan(path: Path) -> Path:
    voxels = _ramp()
    voxels[3, 4, 5:8] = np.nan
    return _nifti(path, voxels)


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated": (_truncated, "is not whole: its voxels cannot be read"),
    "four": (lambda path: _nifti(path, _ramp((40, 44, 36, 5))), r"holds 5 volumes \(40 x 44 x 36 x 5\)"),
    "nan": (_nan, "has 3 voxels that are NaN or infinite"),
    "zero": (_with_spacing_zero, "says that its voxels are 0 x 0 x 0 mm large"),
    "small": (lambda path: _nifti(path, _ramp((40, 44, 3))), "has 40 x 44 x 3 voxels, but a head needs 12"),
    "slab": (lambda path: _nifti(path, _ramp((40, 44, 13))), "part of it is missing"),
    "coarse": (lambda path: _nifti(path, _ramp((13, 13, 13)), 12.0), "more than 10 mm show no ventricle"),
    "large": (lambda path: _nifti(path, _ramp(), 40.0), "voxels of 40 x 40 x 40 mm"),
    "flat": (lambda path: _nifti(path, np.ones((40, 44, 36), dtype=np.float32)), "is empty: all voxels are 1"),
    "bomb": (_claims_much, "claims 30000 x 30000 x 30000 voxels, more than the limit"),
    "colour": (_colours, "has colours, not intensities"),
    "text": (lambda path: path.write_text("x") and path, "is not a readable NIfTI, Analyze or FreeSurfer volume"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_volume_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, message = BAD[name]
    path = make(tmp_path / "head.nii")
    with pytest.raises(ValueError, match=message) as raised:
        read_volume(path)
    assert "head.nii" in str(raised.value)


def test_axes_lead_to_right_front_and_top_however_they_are_stored(tmp_path: Path) -> None:
    voxels = _ramp()
    straight = nibabel.Nifti1Image(voxels, np.diag([4.0, 4, 4, 1]))
    turned = straight.as_reoriented(nibabel.orientations.axcodes2ornt("PIR"))
    nibabel.save(turned, tmp_path / "turned.nii.gz")
    found = read_volume(tmp_path / "turned.nii.gz")
    assert np.array_equal(found.voxels, voxels) and np.allclose(found.affine, straight.affine)
    assert found.spacing == (4, 4, 4) and not found.notes


def test_an_analyze_pair_is_read_and_doubted(tmp_path: Path) -> None:
    # as on OASIS-1's discs, with a fourth axis of length 1
    nibabel.save(nibabel.AnalyzeImage(_ramp((40, 44, 36, 1)), np.diag([4.0, 4, 4, 1])), tmp_path / "head.img")
    found = read_volume(tmp_path / "head.hdr")
    assert found.voxels.shape == (40, 44, 36) and "left and right may be exchanged" in found.notes[0]


def _dicom(path: Path, pixels: np.ndarray, place: float, series: str, **tags: Any) -> Path:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Modality, data.SeriesInstanceUID, data.SeriesDescription = "MR", series, f"T1 {series[-4:]}"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 0
    data.PixelSpacing, data.SliceThickness = [4.0, 4.0], 4.0
    data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0.0, 0.0, place]
    data.PixelData = pixels.astype("<u2").tobytes()
    for name, value in tags.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def _series(folder: Path, *, places: list[float], series: str = "1.2.3.4001", start: int = 0) -> list[Path]:
    return [
        _dicom(folder / f"{start + (7 * k) % 23:03d}.dcm", _ramp((44, 40)) + place, place, series)
        for k, place in enumerate(places)
    ]


def test_a_series_is_put_together_by_the_places_of_its_slices(tmp_path: Path) -> None:
    files = _series(tmp_path, places=[4.0 * k for k in range(16)])
    found = read_series(sorted(files))
    assert found.voxels.shape == (40, 44, 16) and found.modality == "MR"
    # DICOM counts to the left and to the back: both axes turn
    expected = np.stack([(_ramp((44, 40)) + 4.0 * k).T[::-1, ::-1] for k in range(16)], axis=2)
    assert np.array_equal(found.voxels, expected) and np.allclose(np.abs(np.diag(found.affine)), [4, 4, 4, 1])


def test_bad_series_are_refused_by_name(tmp_path: Path) -> None:
    whole = [4.0 * k for k in range(16)]
    gap = _series(tmp_path / "gap", places=[*whole[:8], *whole[10:]])
    with pytest.raises(ValueError, match="4 to 12 mm apart; slices are missing"):
        read_series(gap)
    twice = _series(tmp_path / "twice", places=[*whole, 8.0])
    with pytest.raises(ValueError, match="lie at one place; several echoes or times are mixed"):
        read_series(twice)
    mixed = _series(tmp_path / "mixed", places=whole[:3])
    mixed += _series(tmp_path / "mixed", places=whole[:4], series="1.2.3.4002", start=100)
    with pytest.raises(ValueError, match=r"mixed holds 2 series: T1 4001 \(3 files\); T1 4002 \(4 files\)"):
        read_series(mixed)
    report = _dicom(tmp_path / "report" / "a.dcm", _ramp((44, 40)), 0.0, "1.2.3.9", PixelData=None)
    with pytest.raises(ValueError, match="without pixel data, such as a report"):
        read_series([report])
    with pytest.raises(ValueError, match=r"a\.dcm holds no pixel data"):
        read_slice(report)
    (tmp_path / "cut.dcm").write_bytes(gap[0].read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut\.dcm"):
        read_series([tmp_path / "cut.dcm"])


def test_a_single_slice_takes_its_window_and_the_right_side_of_dark(tmp_path: Path) -> None:
    pixels = _ramp((44, 40))
    plain = read_slice(_dicom(tmp_path / "a.dcm", pixels, 0.0, "1.2.3.1"))
    assert np.array_equal(plain, np.rint(pixels / pixels.max() * 255))
    dark = _dicom(tmp_path / "b.dcm", pixels, 0.0, "1.2.3.1", PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(read_slice(dark), np.rint((pixels.max() - pixels) / pixels.max() * 255))
    window = _dicom(tmp_path / "c.dcm", pixels, 0.0, "1.2.3.1", WindowCenter=500.0, WindowWidth=200.0)
    found = read_slice(window)
    assert found.min() == 0 and found.max() == 255 and found.ravel()[300] == 0 and found.ravel()[700] == 255
    (case,) = read_cases(tmp_path / "a.dcm", Reading(shape=(44, 40)))
    assert not case.whole and np.array_equal(case.images[0, 0].numpy(), plain)
    assert any("names no window" in note for note in case.notes)


@pytest.mark.parametrize(
    ("stored", "tags", "expected"),
    [
        # 8 bits are a picture: what is not black or white stays so
        (8, {}, lambda pixels: pixels),
        (8, {"PhotometricInterpretation": "MONOCHROME1"}, lambda pixels: 255 - pixels),
        # a window that the picture does not fill: below its middle everything is dark
        (16, {"WindowCenter": 200.5, "WindowWidth": 401.0}, lambda pixels: pixels / 400 * 255),
        (12, {"WindowCenter": 200.5, "WindowWidth": 401.0}, lambda pixels: pixels / 400 * 255),
        (
            12,
            {"WindowCenter": 301.0, "WindowWidth": 802.0, "RescaleSlope": 2.0, "RescaleIntercept": -100.0},
            lambda pixels: (2 * pixels - 100 + 100) / 801 * 255,
        ),
    ],
)
def test_a_slice_that_is_dark_by_its_own_window_stays_dark(
    stored: int, tags: dict[str, Any], expected: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    pixels = 20 + np.arange(44 * 40).reshape(44, 40) % 150
    file = _dicom(tmp_path / "a.dcm", pixels, 0.0, "1.2.3.1", BitsStored=stored, HighBit=stored - 1, **tags)
    assert np.abs(read_slice(file).astype(float) - expected(pixels)).max() <= 1
    (case,) = read_cases(file, Reading(shape=(44, 40)))
    assert not any("names no window" in note for note in case.notes)


def test_a_table_of_values_of_interest_fills_the_range_of_its_bits(tmp_path: Path) -> None:
    pixels = np.arange(44 * 40).reshape(44, 40) % 200
    table = FileDataset(None, {})
    table.LUTDescriptor, table.LUTData = [256, 0, 10], np.arange(256, dtype="<u2").tobytes()
    file = _dicom(tmp_path / "a.dcm", pixels, 0.0, "1.2.3.1", BitsStored=12, HighBit=11, VOILUTSequence=[table])
    assert np.array_equal(read_slice(file), np.rint(pixels / 1023 * 255))


@pytest.fixture(scope="module")
def template() -> Volume:
    image = standard.template_image()
    affine = np.diag([-1.0, -1, 1, 1]) @ np.array(
        [[*row, 0] for row in np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()] + [[0, 0, 0, 1]]
    )
    affine[:3, 3] = np.array([-1.0, -1, 1]) * image.GetOrigin()
    return Volume("template", sitk.GetArrayFromImage(image).transpose(2, 1, 0).copy(), affine)


@pytest.fixture(scope="module")
def moved(template: Volume) -> Volume:
    """The template as another person's head: turned, scaled, sampled anew at 2 mm, with shading and noise."""
    move = sitk.Euler3DTransform((0, 0, 0), 0.1, -0.06, 0.12, (6.0, -9.0, 12.0))
    grid = sitk.Image(96, 116, 94, sitk.sitkFloat32)
    grid.SetSpacing((2.1, 2.0, 1.9))
    grid.SetOrigin((-100.0, -100.0, -82.0))
    head = sitk.GetArrayFromImage(sitk.Resample(as_image(template), grid, move, sitk.sitkLinear, 0.0)).transpose(
        2, 1, 0
    )
    shading = np.linspace(0.8, 1.2, head.shape[0])[:, None, None]
    noise = np.random.default_rng(0).normal(0, 3, head.shape)
    voxels = np.where(head > 1, np.clip(4 * (head * shading + noise), 4, None), 0).astype(np.float32)
    affine = np.diag([-2.1, -2.0, 1.9, 1.0])
    affine[:3, 3] = (100.0, 100.0, -82.0)
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(voxels, affine))
    return Volume("moved", image.get_fdata(dtype=np.float32), np.asarray(image.affine))


STRIPPED = Stripping(stripped=True)


@pytest.mark.slow
def test_a_moved_head_gives_the_templates_slices(template: Volume, moved: Volume) -> None:
    own = sitk.Resample(as_image(template), standard.grid(Cut()), sitk.Transform(), sitk.sitkLinear, 0.0)
    expected = sitk.GetArrayFromImage(own)
    found = standardise(moved, stripping=STRIPPED)
    assert found.slices.shape == (32, 128, 128) and found.slices.dtype == np.uint8
    assert found.levels == list(range(-4, 28)) and not found.notes
    assert min(correlation(one, other) for one, other in zip(found.slices, expected)) > 0.97
    assert found.facts["correlation"] > 0.95 and found.facts["overlap"] > 0.95 and len(found.facts["transform"]) == 15
    assert found.facts["brain_ml"] == pytest.approx(1900, abs=150)
    assert np.percentile(found.slices[found.slices > 20], 99.5) == pytest.approx(241, abs=6)
    assert list(found.pictures) == ["as read", "brain", "shading corrected", "on the template", "template"]
    assert all(picture.min() >= 0 and picture.max() <= 1 for picture in found.pictures.values())


@pytest.mark.slow
def test_a_head_that_lies_otherwise_than_its_file_says(moved: Volume) -> None:
    turned = replace(moved, voxels=np.ascontiguousarray(moved.voxels[:, :, ::-1]))
    with pytest.raises(ValueError, match="the head does not lie as the file says"):
        standardise(turned, stripping=STRIPPED, even=False)
    unsure = replace(turned, notes=("The file does not say how the head lies.",))
    found = standardise(unsure, stripping=STRIPPED, even=False, cut=Cut(count=3))
    assert found.facts["correlation"] > 0.9 and "turned to lie as the template does" in found.notes[-1]
    assert found.slices.shape[0] == 3 and found.levels == [-4, 11.5, 27]


def test_part_of_a_head_is_refused_with_the_pictures_of_the_steps(moved: Volume) -> None:
    lower = moved.voxels.copy()
    lower[:, :, 30:] = 0
    with pytest.raises(ValueError, match="ml, not 700 to 2,000"):
        standardise(replace(moved, voxels=lower), stripping=STRIPPED, even=False)
    with pytest.raises(PoorScan, match="does not lie well on the template") as raised:
        standard._check_fit("head", {"correlation": 0.6, "overlap": 0.95}, "T1", {"brain": np.zeros((2, 2))})
    assert "brain" in raised.value.pictures
    # of another contrast only the outline counts
    standard._check_fit("head", {"correlation": 0.6, "overlap": 0.95}, "T2", {})


def test_a_brain_must_be_of_a_persons_size(moved: Volume) -> None:
    inside = moved.voxels > 0
    assert brain_ml(moved, inside) > 1500
    half = replace(moved, affine=moved.affine @ np.diag([0.5, 0.5, 0.5, 1.0]))
    with pytest.raises(ValueError, match=r"would have 2\d\d ml, not 700 to 2,000"):
        brain_ml(half, inside)


def test_what_is_not_stripped_and_what_is_no_mask_is_refused(moved: Volume, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not stripped: only"):
        stripped_brain(moved.with_voxels(moved.voxels + np.random.default_rng(0).random(moved.voxels.shape)))
    nibabel.save(nibabel.Nifti1Image((moved.voxels > 0).astype(np.float32), moved.affine), tmp_path / "mask.nii")
    assert np.array_equal(given_brain(moved, tmp_path / "mask.nii"), moved.voxels > 0)
    other = replace(moved, affine=moved.affine + np.diag([0.5, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"mask\.nii is not a mask of moved"):
        given_brain(other, tmp_path / "mask.nii")


def test_cuts_of_other_planes_and_numbers() -> None:
    assert Cut(count=1).levels == [11.5] and Cut("sagittal", 3).levels == [-30, 0, 30]
    with pytest.raises(ValueError, match="plane must be one of axial, coronal, sagittal"):
        Cut("oblique")
    with pytest.raises(ValueError, match="at least one slice"):
        Cut(count=0)
    with pytest.raises(ValueError, match="modality must be one of T1"):
        standardise(Volume("x", np.zeros((2, 2, 2)), np.eye(4)), modality="DTI")


def test_rows_of_axial_slices_lead_to_the_front_as_in_the_public_ones() -> None:
    grid = standard.grid(Cut())
    first, last = grid.TransformIndexToPhysicalPoint((64, 0, 0)), grid.TransformIndexToPhysicalPoint((64, 127, 31))
    # SimpleITK counts to the back, and the public slices are upside down: the back of the head is on top
    assert first[1] == pytest.approx(63.5 * 1.722 + 17.1) and last[1] == pytest.approx(17.1 - 63.5 * 1.722)
    assert (first[2], last[2]) == (-4, 27)


@pytest.mark.slow
@pytest.mark.skipif(not COLIN.is_dir(), reason="needs Debian's mricron-data, a whole head")
def test_a_whole_head_and_its_stripped_copy_give_the_same_slices() -> None:
    extra("deepbet")
    whole = standardise(read_volume(COLIN / "ch2.nii.gz"))
    stripped = standardise(read_volume(COLIN / "ch2bet.nii.gz"), stripping=STRIPPED)
    assert min(correlation(one, other) for one, other in zip(whole.slices, stripped.slices)) >= 0.95
    assert whole.facts["brain_ml"] < 2000 and whole.facts["correlation"] > 0.93


def test_a_missing_library_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from utils.data import extras

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(extras, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=r"head\.nii is a volume, which is read with nibabel: pip install -r"):
        read_volume(tmp_path / "head.nii")


@pytest.mark.parametrize(("modality", "doubt"), [("MR", False), ("US", True), ("CT", True)])
def test_a_slice_of_another_machine_is_answered_with_a_doubt(modality: str, doubt: bool, tmp_path: Path) -> None:
    file = _dicom(tmp_path / "a.dcm", _ramp((44, 40)), 0.0, "1.2.3.7", Modality=modality)
    (case,) = read_cases(file, Reading(shape=(44, 40)))
    assert any(f"it is {modality} and not MR" in note for note in case.notes) == doubt
