"""Cut every head of a cohort into slices, once: what is finished is not done again."""

from __future__ import annotations

import hashlib
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from utils.core.paths import atomic_write, read_json, write_json
from utils.data.folders import is_dicom
from utils.data.scans.cohort import Cohort, Scan, ScanOptions
from utils.data.scans.dicom import read_series
from utils.data.scans.standard import PoorScan, Standard, standardise
from utils.data.scans.volume import read_volume

#: Beside the slices: what was measured of each scan, and the pictures of its preparation.
FACTS, STEPS = "facts", "steps"
_MOST_REFUSED = 0.5


def cut_cohort(cohort: Cohort, options: ScanOptions, folder: Path) -> tuple[Path, list[str]]:
    """Write ``slices/CLASS/PATIENT/SCAN_NN.png`` for each scan, and what was measured of it.

    A scan that cannot be used is left out and named.

    Args:
        folder: kept between runs; scans that are finished there with the same options are not done again.

    Returns:
        the folder of classes, and notes.

    Raises:
        ModuleNotFoundError: a library of ``env/requirements-scans.txt`` is missing.
        ValueError: more than half of the scans cannot be used.
    """
    slices, refused = folder / "slices", {}
    wanted: set[Path] = set()
    for scan in tqdm(cohort.scans, desc="scans", disable=len(cohort.scans) < 2):
        try:
            wanted |= set(_cut(scan, options, folder))
        except (OSError, ValueError) as error:
            refused[scan.name] = str(error)
            if isinstance(error, PoorScan):
                _draw_steps(folder / STEPS / f"{_file(scan.name)}.png", error.pictures)
    if len(refused) > _MOST_REFUSED * len(cohort.scans):
        first = next(iter(refused.values()))
        raise ValueError(f"{len(refused)} of {len(cohort.scans)} scans cannot be used; the first: {first}")
    for file in slices.rglob("*.png"):
        if file not in wanted:  # of an earlier run with other scans or options
            file.unlink()
    notes = [f"{len(cohort.scans) - len(refused)} scans of {cohort.kind} were cut into slices.", *cohort.notes]
    notes += [f"Left out: {reason}" for reason in refused.values()]
    return slices, notes


def _cut(scan: Scan, options: ScanOptions, folder: Path) -> list[Path]:
    """The slices of a scan, made now or before."""
    facts = folder / FACTS / f"{_file(scan.name)}.json"
    key = _key(scan, options)
    target = folder / "slices" / scan.label / _file(scan.subject)
    stored: dict[str, Any] = read_json(facts) if facts.is_file() else {}
    paths = [target / f"{_file(scan.name)}_{number:02d}.png" for number in range(options.slices)]
    if stored.get("key") == key and all(path.is_file() for path in paths):
        return paths
    head = read_series(scan.files) if is_dicom(scan.files[0]) else read_volume(scan.files[0])
    made = standardise(head, stripping=scan.stripping, cut=options.cut, modality=options.modality)
    for path, piece in zip(paths, made.slices):
        atomic_write(path, partial(Image.fromarray(piece).save, format="PNG"))
    _draw_steps(folder / STEPS / f"{_file(scan.name)}.png", made.pictures)
    write_json(facts, _told(scan, made) | {"key": key})
    return paths


def _told(scan: Scan, made: Standard) -> dict[str, Any]:
    own = {"scan": scan.name, "subject": scan.subject, "label": scan.label, "files": [file.name for file in scan.files]}
    return own | made.facts | {"levels_mm": made.levels, "notes": made.notes}


def _key(scan: Scan, options: ScanOptions) -> str:
    """Of files and options: another one asks for another cut."""
    digest = hashlib.sha256(repr((options.cut, options.modality, scan.stripping, scan.label, scan.subject)).encode())
    for file in scan.files:
        facts = file.stat()
        digest.update(f"{file.name}{facts.st_size}".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(1 << 16))
    return digest.hexdigest()[:16]


def _draw_steps(target: Path, pictures: dict[str, np.ndarray]) -> None:
    """The steps of a preparation below each other, each with its name."""
    width, space = max(picture.shape[1] for picture in pictures.values()), 16
    height = sum(picture.shape[0] + space for picture in pictures.values())
    sheet = Image.new("L", (width, height))
    draw, top = ImageDraw.Draw(sheet), 0
    for title, picture in pictures.items():
        draw.text((4, top + 2), title, fill=255)
        sheet.paste(Image.fromarray((255 * picture).astype(np.uint8)), (0, top + space))
        top += picture.shape[0] + space
    atomic_write(target, partial(sheet.save, format="PNG"))


def _file(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)
