"""How well simple readers tell Non from the rest, by the number of patients that they learn from.

    python -m benchmarks.patient_signal --weights PATH

A network trained here that stays below a target may be a bad network, or the images may not hold more. Three simple
readers help to tell: two sizes that a radiologist reads off, coarse pixels, and the features of a frozen encoder, each
followed by a logistic regression over patients. Where their curves still rise with the number of patients, more of them
are missing; where they are flat, so much is all that this reader gets out of the images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from benchmarks.measure import FOLDER, progress, save
from models.def_models import MRIClassifier, build_model
from utils.core.paths import DATASET_VARIABLES
from utils.core.precision import autocast
from utils.data.sets import ImageSet, load_splits
from utils.data.workspace import pick_device
from utils.evaluation.baselines import fluid_shares
from utils.reporting.style import axes_of, finish, line_style

#: Every so many slices of a patient one is read.
STRIDE = 4
POOLED = 16
BATCH = 32
TRAIN_PATIENTS = (20, 40, 80, 120, 160)
FOLDS = 5
STRENGTHS = 10.0 ** np.arange(-5, 1)


def read_slices(images: ImageSet, weights: Path, image_size: int) -> dict[str, np.ndarray]:
    """Name of the reader -> one row of features a patient, its slices side by side in order. Shape P x D.

    Raises:
        ValueError: a patient or the place of a slice is unknown, or patients have different numbers of slices.
    """
    counts = images.subjects.unique(return_counts=True)[1]
    if min(images.subjects.min(), images.slices.min()) < 0 or len(counts.unique()) != 1:
        raise ValueError("this compares patients slice by slice: all need the same number of slices in a known order")
    order = sorted(range(len(images)), key=lambda i: (images.subjects[i].item(), images.slices[i].item()))
    chosen = torch.tensor([i for i in order if images.slices[i] % STRIDE == 0])
    n = len(images.subjects.unique())
    pooled = F.adaptive_avg_pool2d(images.pixels(chosen, "cpu"), POOLED)
    shares = fluid_shares(images.images[chosen, 0].numpy()).reshape(n, -1, 2).mean(1)
    encoder = build_model("dino_v2", image_size=image_size, weights=weights).eval().to(pick_device())
    return {
        "ventricles and sulci": shares,
        f"pixels, {POOLED} x {POOLED}": pooled.reshape(n, -1).numpy(),
        "frozen encoder": _encoded(encoder, images, chosen).reshape(n, -1).numpy(),
    }


@torch.inference_mode()
def _encoded(model: MRIClassifier, images: ImageSet, chosen: torch.Tensor) -> torch.Tensor:
    """Class token beside the mean of the patches. Shape N x 2C."""
    device, rows = pick_device(), []
    for part in progress(list(chosen.split(BATCH)), "encoder"):
        with autocast("bf16", device):
            tokens = model.backbone.forward_features(model.prepared(images.pixels(part, device))).float()
        rows.append(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1).cpu())
    return torch.cat(rows)


def auroc_by_patients(features: np.ndarray, demented: np.ndarray, repeats: int, seed: int) -> dict[int, list[float]]:
    """Patients learnt from -> mean over ``FOLDS`` of the AUROC on the patients held out, one value a repeat.

    The strength of the regression is chosen within the patients that are learnt from.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GridSearchCV, StratifiedKFold, train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    most = len(demented) - len(demented) // FOLDS
    sizes = [size for size in TRAIN_PATIENTS if size < most] + [most]
    found: dict[int, list[float]] = {size: [] for size in sizes}
    for repeat in range(repeats):
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed + repeat)
        areas: dict[int, list[float]] = {size: [] for size in sizes}
        for train, test in folds.split(features, demented):
            for size in sizes:
                few = train
                if size < len(train):
                    few = train_test_split(train, train_size=size, stratify=demented[train], random_state=repeat)[0]
                inner = StratifiedKFold(FOLDS, shuffle=True, random_state=repeat)
                reader = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
                model = GridSearchCV(reader, {"logisticregression__C": STRENGTHS}, scoring="roc_auc", cv=inner)
                model.fit(features[few], demented[few])
                areas[size].append(roc_auc_score(demented[test], model.decision_function(features[test])))
        for size, own in areas.items():
            found[size].append(float(np.mean(own)))
    return found


def signal_figure(readers: dict[str, dict[int, list[float]]], note: str) -> Figure:
    """AUROC over the number of patients, mean and standard deviation over repeats."""
    figure, axes = axes_of(size=(7.5, 4.2))
    ax = axes[0, 0]
    for index, (name, found) in enumerate(readers.items()):
        values = 100 * np.array(list(found.values()))
        style = line_style(index)
        ax.errorbar(list(found), values.mean(1), yerr=values.std(1, ddof=1), capsize=3, label=name, **style)
    ax.set(xlabel="patients to learn from", ylabel="AUROC by patient, Non against the rest (%)")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    return finish(figure, "Simple readers of the slices", note)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parse(arguments)
    try:
        splits = load_splits(args.data)
        if splits.info["protocol"] != "patient":
            raise ValueError(f"{args.data} is split by {splits.info['protocol']}; prepare with --split patient")
        if args.repeats < 2:
            raise ValueError(f"--repeats must be at least 2 to have a spread, not {args.repeats}")
        images = splits.everyone
        features = read_slices(images, args.weights, args.image_size)
        labels = {subject.item(): label.item() for subject, label in zip(images.subjects, images.labels)}
        demented = np.array([labels[subject] > 0 for subject in sorted(labels)])
        readers = {
            name: auroc_by_patients(own, demented, args.repeats, args.seed)
            for name, own in progress(list(features.items()), "readers")
        }
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    content: dict[str, Any] = {
        "readers": {name: {str(size): values for size, values in found.items()} for name, found in readers.items()},
        "features": {name: own.shape[1] for name, own in features.items()},
        "encoder": {"weights": args.weights.name, "image_size": args.image_size},
        "n_subjects": len(demented),
        "folds": FOLDS,
        "repeats": args.repeats,
        "seed": args.seed,
        "data": splits.info,
    }
    note = f"{len(demented)} patients, {args.repeats} times {FOLDS} folds; bars: standard deviation over the times"
    save("patient_signal", content, signal_figure(readers, note), args.out)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.patient_signal", description="What the slices hold")
    add = parser.add_argument
    add("--weights", type=Path, required=True, help="encoder of DINOv2 ViT-S/14")
    add("--data", type=Path, default=DATASET_VARIABLES, help="folder of prepared *_set.pt, split by patient")
    add("--image-size", type=int, default=224, help="side that the encoder sees (default 224)")
    add("--repeats", type=int, default=5)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=FOLDER)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
