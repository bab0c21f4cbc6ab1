"""Slices as files of other programs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import extra

from utils.data.slice_files import KINDS, read_slices, write_slices


@pytest.mark.parametrize(("kind", "most"), [("png8", 0.5 / 255), ("png16", 1e-5), ("nifti", 1e-7), ("dicom", 1e-5)])
@pytest.mark.parametrize("count", [1, 3])
def test_what_is_written_is_read_as_exactly_as_the_file_can(kind: str, most: float, count: int, tmp_path: Path) -> None:
    for module in ("nibabel", "pydicom"):
        extra(module)
    slices = np.random.default_rng(count).random((count, 20, 30), dtype=np.float32)
    files = write_slices(slices, tmp_path / "new" / "attacked", kind)
    again = read_slices(files, kind)
    assert again.shape == slices.shape and again.dtype == np.float32
    assert np.abs(again - slices).max() <= most + 1e-7
    assert len(files) == (1 if kind == "nifti" else count) and all(file.is_file() for file in files)


def test_dicom_files_say_what_they_are(tmp_path: Path) -> None:
    pydicom = extra("pydicom")
    files = write_slices(np.zeros((2, 16, 16)), tmp_path / "a", "dicom")
    headers = [pydicom.dcmread(file) for file in files]
    assert len({header.SeriesInstanceUID for header in headers}) == 1 and headers[1].InstanceNumber == 2
    assert "not for clinical use" in headers[0].SeriesDescription


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="files are of the kinds png8, png16, nifti, dicom, not 'gif'"):
        write_slices(np.zeros((1, 4, 4)), tmp_path / "a", "gif")
    assert list(KINDS) == ["png8", "png16", "nifti", "dicom"]
