"""Does the gate notice scans that went wrong by themselves?

    python -m benchmarks.bad_scans --data dataset/dataset_variables

Asked is the gate of a set, as ``python -m utils calibrate`` fits it; no network takes part. Kinds and severities are
those of the atlas.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.measure import FOLDER, progress, save
from utils.core.paths import DATASET_VARIABLES
from utils.data.corruptions import CORRUPTIONS, SEVERITIES, corrupted
from utils.data.sets import DataSplits, ImageSet, load_splits
from utils.data.stacks import patient_stacks
from utils.evaluation.gate import ACCEPTED, Gate, fit_gate
from utils.experiments.atlas.bench import flat
from utils.reporting.style import axes_of, finish

#: Slices of each patient, as in the atlas.
SLICES = 4
AS_SCANNED = "as scanned"


def noticed_shares(splits: DataSplits, gate: Gate, seed: int = 0) -> dict[str, Any]:
    """Share of test patients who are not accepted, by kind and severity.

    Returns:
        plain values: ``patients``, ``slices``; ``noticed``, kind -> shares 0..1 at each severity; ``by_distance``, the
        same of a gate that looks at the distance alone; both also of the slices :data:`AS_SCANNED`, one share.
    """
    stacks = patient_stacks(splits.test, SLICES)
    slices = flat(stacks)
    found: dict[str, Any] = {"noticed": {}, "by_distance": {}, "patients": len(stacks), "slices": SLICES}
    kinds = [(AS_SCANNED, [slices])]
    kinds += [(kind, [corrupted(slices, kind, how, seed=seed) for how in SEVERITIES]) for kind in CORRUPTIONS]
    for kind, sets in progress(kinds, "scans"):
        found["noticed"][kind] = [_share(gate, images, SLICES) for images in sets]
        found["by_distance"][kind] = [_by_distance(gate, images, SLICES) for images in sets]
    return found


def _share(gate: Gate, images: ImageSet, slices: int) -> float:
    heads = images.pixels(slice(0, len(images))).split(slices)
    return sum(gate.of_case(head)[0] != ACCEPTED for head in heads) / len(heads)


def _by_distance(gate: Gate, images: ImageSet, slices: int) -> float:
    heads = gate.distances(images.pixels(slice(0, len(images)))).split(slices)
    return sum(gate.verdict(float(head.median())) != ACCEPTED for head in heads) / len(heads)


def noticed_figure(content: Mapping[str, Any], note: str) -> Figure:
    """Patients who are not accepted, in percent, kinds by severities: by the distance alone, and by all checks."""
    figure, axes = axes_of(1, 2, size=(9, 5.4), sharey=True)
    panels = (("by_distance", "by the distance alone"), ("noticed", "with grey and detail"))
    kinds = [kind for kind in content["noticed"] if kind != AS_SCANNED]
    for ax, (key, title) in zip(axes[0], panels):
        shares = 100 * np.array([content[key][kind] for kind in kinds])
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        for (row, column), share in np.ndenumerate(shares):
            ax.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=9, color=_ink(share))
        ax.set_title(f"{title}; as scanned {100 * content[key][AS_SCANNED][0]:.0f} %", fontsize=10)
        ax.set(xlabel="severity", xticks=range(shares.shape[1]), yticks=range(len(kinds)))
        ax.set_xticklabels(list(SEVERITIES))
        ax.grid(False)
    axes[0, 0].set_yticklabels(kinds)
    return finish(figure, "Patients whom the gate does not accept once their scan went wrong (%)", note)


def _ink(share: float) -> str:
    return "white" if share > 55 else "black"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parse(arguments)
    torch.manual_seed(args.seed)
    try:
        splits = load_splits(args.data)
        content = noticed_shares(splits, fit_gate(splits.train, splits.validation), args.seed)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    content |= {"data": splits.info, "seed": args.seed}
    whose = f"{content['patients']} test patients, {SLICES} slices each"
    note = f"{splits.info['source']}, {splits.info['protocol']} split; {whose}"
    save("bad_scans", content, noticed_figure(content, note), args.out)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bad_scans", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=DATASET_VARIABLES, help="folder of prepared *_set.pt")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=FOLDER)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
