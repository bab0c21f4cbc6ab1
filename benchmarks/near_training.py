"""How right a model is on test images that resemble a training image much, and on those that resemble none.

    python -m benchmarks.near_training --root benchmarks/published --data runs/published

Reads the worst cases in the records below ``ROOT/checkpoints``; nothing is attacked again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.measure import FOLDER, save
from utils.core.paths import ROOT
from utils.core.radii import ORIGINAL_EPS, radius_label
from utils.data.sets import DataSplits, ImageSet, load_splits
from utils.data.workspace import Workspace
from utils.evaluation.curve import RobustnessCurve
from utils.evaluation.leak_audit import highest_correlations
from utils.experiments.records import display_name, trained_models
from utils.reporting.style import axes_of, finish, line_style, percent_axis
from utils.training.record import ModelRecord

GROUPS = 5
EPSILONS = (0.0, ORIGINAL_EPS)


def right_by_resemblance(records: Mapping[str, ModelRecord], splits: DataSplits) -> dict[str, Any]:
    """Accuracy without attack and at the radius of the original work, by the test image's resemblance to training.

    Resemblance is the highest correlation with any training image, of pixels pooled to 64 x 64; the test images of the
    records are sorted by it and cut into ``GROUPS`` parts of the same size. Two more groups are the slices with a
    neighbour in training, the next or the last slice of the same patient, and those without.

    Args:
        records: title -> record of a model whose notebooks have attacked it.
        splits: the data that all of them were trained and tested on.

    Returns:
        plain values: ``groups``, each with its ``name`` and number of images ``n``; ``models``, title -> radius ->
        accuracy of each group, 0..1.

    Raises:
        ValueError: a record of other data, without a worst case at these radii, or of other test images than the rest.
    """
    curves = {}
    for title, record in records.items():
        if record.data is None or record.data.fingerprint != splits.fingerprint:
            raise ValueError(f"{title} was trained on other data or another split than {splits.info['protocol']}")
        if record.worst_case is None:
            raise ValueError(f"the record of {title} holds no attack; run its _atk notebook to the end")
        curves[title] = curve = record.worst_case.curve
        if not set(EPSILONS) <= set(curve.epsilons):
            raise ValueError(f"{title} was not attacked at {ORIGINAL_EPS}; put it among the notebook's epsilons")
    counts = {curve.n_images for curve in curves.values()}
    if len(counts) != 1:
        raise ValueError(f"models were tested on different numbers of images: {', '.join(map(str, sorted(counts)))}")
    few = splits.test.balanced_subset(counts.pop())
    groups = {**_by_resemblance(splits.train, few), **_by_neighbours(splits.train, few)}
    return {
        "groups": [{"name": name, "n": len(own)} for name, own in groups.items()],
        "models": {title: _right(curve, list(groups.values())) for title, curve in curves.items()},
    }


def _by_resemblance(train: ImageSet, test: ImageSet) -> dict[str, np.ndarray]:
    found = highest_correlations(train, test)
    parts = np.array_split(np.argsort(found), GROUPS)
    return {f"{found[own].min():.3f} to {found[own].max():.3f}": own for own in parts}


def _by_neighbours(train: ImageSet, test: ImageSet) -> dict[str, np.ndarray]:
    known = set(zip(train.subjects.tolist(), train.slices.tolist()))
    asked = zip(test.subjects.tolist(), test.slices.tolist())
    beside = np.array([bool(known & {(who, place - 1), (who, place + 1)}) for who, place in asked])
    return {"neighbour in training": np.flatnonzero(beside), "none": np.flatnonzero(~beside)}


def _right(curve: RobustnessCurve, groups: Sequence[np.ndarray]) -> dict[str, list[float | None]]:
    right = {eps: curve.robust(curve.epsilons.index(eps)).numpy() for eps in EPSILONS}
    return {
        str(eps): [float(robust[own].mean()) if len(own) else None for own in groups] for eps, robust in right.items()
    }


def resemblance_figure(content: Mapping[str, Any], note: str) -> Figure:
    """A panel a radius, a line a model, over the groups of growing resemblance."""
    figure, axes = axes_of(1, len(EPSILONS), size=(10, 4), sharey=True)
    names = [group["name"].replace(" ", "\n", 1) for group in content["groups"][:GROUPS]]
    for ax, eps in zip(axes[0], EPSILONS):
        for index, (title, found) in enumerate(content["models"].items()):
            shares = [100 * share for share in found[str(eps)][:GROUPS]]
            ax.plot(range(len(names)), shares, label=display_name(title), **line_style(index))
        ax.set_xticks(range(len(names)), names, fontsize=8)
        ax.set_title(f"worst case at {radius_label(eps)}" if eps else "without attack", fontsize=10)
        ax.set(xlabel="highest correlation with a training image")
    axes[0, 0].set(ylabel="accuracy (%)")
    percent_axis(axes[0, 0])
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    return finish(figure, "Accuracy by resemblance to a training image", note)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parse(arguments)
    try:
        workspace = Workspace.open(str(args.root), data_dir=args.data)
        splits = load_splits(workspace.data_dir)
        records = trained_models(workspace)
        if not records:
            raise ValueError(f"no trained model in {args.root / 'checkpoints'}")
        content = right_by_resemblance(records, splits) | {"data": splits.info}
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    protocol = splits.info["protocol"]
    sizes = sorted({group["n"] for group in content["groups"][:GROUPS]})
    note = f"{splits.info['source']}, {protocol} split; {' or '.join(map(str, sizes))} test images a point"
    save(f"near_training_{protocol}", content, resemblance_figure(content, note), args.out)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.near_training", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--root", type=Path, default=ROOT, help="holds checkpoints/ (default: this repository)")
    add("--data", default="", help="folder of prepared *_set.pt; default: that of ROOT")
    add("--out", type=Path, default=FOLDER)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
