"""Preparing a set of 80,000 slices: seconds, peak memory, and whether the right patients come out.

    python -m benchmarks.large_set

Draws smooth random heads of as many people as asked for, every slice of each, files them as JPEGs whose names say
nothing of the people, and runs ``python -m utils prepare`` on the folder in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import scipy  # loads its parts at their first use
from PIL import Image

from benchmarks.measure import FOLDER, progress
from benchmarks.whole_processes import run_process
from utils.core.paths import write_json
from utils.core.reproducibility import environment_facts
from utils.data.classes import CLASSES
from utils.data.sets import load_splits

LEVELS, SIDE = 32, 128
_GRID = 64
#: Pixels and slices over which a head changes.
_SMOOTH, _SMOOTH_LEVELS = 2.5, 6.0


def draw_head(person: int) -> np.ndarray:
    """All slices of one person, uint8 32 x 128 x 128 on black: smooth noise in an ellipse, no anatomy."""
    rng = np.random.default_rng([7, person])
    noise = scipy.ndimage.gaussian_filter(
        rng.standard_normal((LEVELS, _GRID, _GRID)), (_SMOOTH_LEVELS, _SMOOTH, _SMOOTH)
    )
    rows, columns = np.mgrid[-1 : 1 : _GRID * 1j, -1 : 1 : _GRID * 1j]
    inside = (rows / 0.8) ** 2 + (columns / 0.7) ** 2 < 1
    grey = np.where(inside, 120 + 45 * noise / noise.std(), 0).clip(0, 255)
    return grey.astype(np.uint8).repeat(SIDE // _GRID, 1).repeat(SIDE // _GRID, 2)


def write_head(person: int, folder: Path) -> None:
    """File the slices of one person under the class of their turn."""
    name = CLASSES[person % len(CLASSES)]
    (folder / name).mkdir(parents=True, exist_ok=True)
    for level, image in enumerate(draw_head(person)):
        # a scrambled number, from which nobody learns whose slice it is
        number = (LEVELS * person + level) * 7919 % 1_000_003
        Image.fromarray(image).save(folder / name / f"x{number}.jpg", quality=92)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parse(arguments)
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "heads", Path(name) / "prepared"
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            list(progress(pool.map(partial(write_head, folder=source), range(args.people), chunksize=16), "draw"))
        seconds, peak = run_process(["-m", "utils", "prepare", "--source", str(source), "--out", str(target)])
        splits = load_splits(target)
        content = {
            "images": LEVELS * args.people,
            "side": SIDE,
            "people": args.people,
            "patients_found": splits.info["patients"]["count"],
            "verified": splits.info["patients"]["verified"],
            "seconds": seconds,
            "peak_mib": peak,
            "environment": environment_facts(),
        }
    write_json(args.out / "large_set.json", content)
    print({key: value for key, value in content.items() if key != "environment"})
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large_set", description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, default=2500, help=f"{LEVELS} slices each (default 2500)")
    parser.add_argument("--out", type=Path, default=FOLDER)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
