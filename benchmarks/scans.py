"""Does the gate refuse what the models do not know, and do slices of a whole head look like the public ones?

    python -m benchmarks.scans --head HEAD.nii.gz --stripped BRAIN.nii.gz

Foreign images are drawn, turned out of test slices, cut from photographs that come with libraries, and from the two
volumes, which show one head with and without its skull. For comparison the networks' own features are asked, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from benchmarks.measure import FOLDER, progress, save
from utils.core.paths import CHECKPOINTS, DATASET_VARIABLES
from utils.core.reproducibility import generator
from utils.data.scans import standard
from utils.data.scans.standard import Stripping, as_image, correlation, fit_of, register, standardise, template_image
from utils.data.scans.volume import Volume, read_volume
from utils.data.sets import DataSplits, ImageSet, load_splits
from utils.evaluation.detectors import GateDetector, answers_and_scores, push_score, share_fooled, share_noticed
from utils.evaluation.gate import Gate, fit_gate
from utils.evaluation.worst_case import robustness_curve
from utils.experiments.atlas.foreign import FOREIGN_EPS, REAL_EPS
from utils.reporting.style import COLOURS, axes_of, finish
from utils.training.checkpoints import load_checkpoint

#: Slices of each foreign set that are made of test slices, or drawn.
MANY = 200
#: Main directions into which features are put before their distances are measured.
DIRECTIONS = 64
#: Wrong turns of a head from which the registration starts, of the 24.
WRONG_TURNS = (1, 4, 9, 15, 20)
#: Steps of PGD on the gate's distance, and test slices that are attacked.
STEPS, FEW = 20, 80


def foreign_sets(test: ImageSet, head: Volume, brain: Volume, seed: int) -> dict[str, torch.Tensor]:
    """Name -> images N x 1 x H x W in [0, 1] that no model of axial stripped slices knows."""
    from torchvision.transforms import functional as transforms

    draws = torch.Generator().manual_seed(seed)
    side = tuple(test.images.shape[-2:])
    own = test.pixels(torch.randperm(len(test), generator=draws)[:MANY])

    def turned(degrees: float) -> torch.Tensor:
        return transforms.rotate(own, degrees, interpolation=transforms.InterpolationMode.BILINEAR).clamp(0, 1)

    return {
        "uniform noise": torch.rand(MANY, 1, *side, generator=draws),
        "smooth noise": F.interpolate(torch.rand(MANY, 1, 8, 8, generator=draws), side, mode="bicubic").clamp(0, 1),
        "photographs": _photographs(seed),
        "whole head": _cut(head, 2, range(64, 100)),
        "coronal slices": _cut(brain, 1, range(40, 180, 4)),
        "sagittal slices": _cut(brain, 0, range(40, 140, 4)),
        "upper brain": _cut(brain, 2, range(130, 150, 2)),
        "turned by 15°": turned(15),
        "turned by 45°": turned(45),
        "turned by 90°": turned(90),
        "upside down": own.flip(-2),
        "inverted": 1 - own,
        "inverted inside the brain": (1 - own) * (own > 10 / 255),
        "black": torch.zeros(20, 1, *side),
    }


def _photographs(seed: int) -> torch.Tensor:
    """Random square parts of the photographs that scikit-learn and matplotlib bring along."""
    import matplotlib.cbook
    from PIL import Image
    from sklearn.datasets import load_sample_images

    grey = [np.asarray(Image.fromarray(picture).convert("L"), dtype=float) for picture in load_sample_images().images]
    with Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as portrait:
        grey.append(np.asarray(portrait.convert("L"), dtype=float))
    rng, parts = np.random.default_rng(seed), []
    for _ in range(MANY):
        picture = grey[rng.integers(len(grey))]
        size = rng.integers(128, min(picture.shape) + 1)
        top, left = (rng.integers(0, length - size + 1) for length in picture.shape)
        parts.append(_square(picture[top : top + size, left : left + size]))
    return torch.stack(parts)


def _cut(volume: Volume, axis: int, places: Sequence[int]) -> torch.Tensor:
    """Planes of a volume as pictures, the front or top of the head where a viewer would put it."""
    planes = [np.take(volume.voxels, place, axis=axis).T for place in places]
    return torch.stack([_square(plane if axis == 2 else plane[::-1]) for plane in planes])


def _square(values: np.ndarray, side: int = 128) -> torch.Tensor:
    picture = torch.from_numpy(np.ascontiguousarray(values)).float()[None, None]
    picture = (picture - picture.min()) / (picture.max() - picture.min()).clamp(min=1e-6)
    return F.interpolate(picture, (side, side), mode="bilinear", antialias=True)[0].clamp(0, 1)


def measure_gate(
    gate: Gate, splits: DataSplits, sets: dict[str, torch.Tensor], models: Sequence[str]
) -> dict[str, Any]:
    """Refused shares and AUROC of each foreign set against the test slices, by the gate and by networks' features."""
    test = splits.test.pixels(slice(0, len(splits.test)))
    scores: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gate": gate.distances}
    scores |= {f"features of {name}": _by_features(name, splits) for name in models}
    own = gate.distances(test)
    medians = [float(own[splits.test.subjects == who].median()) for who in splits.test.subjects.unique()]
    found = {name: _against(score, test, sets) for name, score in progress(list(scores.items()), "scores")}
    return {
        "limits": {"doubtful": gate.doubtful, "refused": gate.refused},
        "test": {
            "slices": len(own),
            "slices_refused": float((own > gate.refused).float().mean()),
            "patients": len(medians),
            "patients_refused": float(np.mean([gate.verdict(value) == "refused" for value in medians])),
        },
        "distances": {"test slices": _rounded(own)} | {n: _rounded(gate.distances(x)) for n, x in sets.items()},
        "refused": {name: float((gate.distances(x) > gate.refused).float().mean()) for name, x in sets.items()},
        "auroc": found,
    }


class _Silent(nn.Module):
    """Answers nothing: for attacks on the gate alone."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.new_zeros(len(images), 2)


def attack_gate(
    gate: Gate, test: ImageSet, sets: dict[str, torch.Tensor], models: Sequence[str], seed: int
) -> dict[str, Any]:
    """What the gate is worth against somebody who knows it.

    Foreign images are pulled towards training slices, test slices away from them, and test slices that a model gets
    right are to be misclassified and accepted at once.
    """
    alone = GateDetector(_Silent(), gate)
    own = gate.distances(test.pixels(slice(0, len(test))))
    pulled = {
        name: gate.distances(
            push_score(alone, images, eps=FOREIGN_EPS, up=False, steps=STEPS, draws=generator(seed, "in"))
        )
        for name, images in progress(list(sets.items()), "foreign images attacked")
    }
    few = test.balanced_subset(FEW)
    pixels = few.pixels(slice(None))
    out = [
        push_score(alone, pixels, eps=eps, up=True, steps=STEPS, draws=generator(seed, "out", eps)) for eps in REAL_EPS
    ]
    return {
        "foreign_radius": FOREIGN_EPS,
        "radii": list(REAL_EPS),
        "steps": STEPS,
        "slices": len(few),
        "refused": {name: float((away > gate.refused).float().mean()) for name, away in pulled.items()},
        "auroc": {name: _area(own, away) for name, away in pulled.items()},
        "test_refused": [float((gate.distances(images) > gate.refused).float().mean()) for images in (pixels, *out)],
        "models": {name: _fooled(gate, few, name, seed) for name in progress(list(models), "test slices attacked")},
    }


def _fooled(gate: Gate, few: ImageSet, name: str, seed: int) -> dict[str, Any]:
    """Right slices that are misclassified and accepted, and what plain PGD turns and the gate notices."""
    model, _ = load_checkpoint(CHECKPOINTS / name)
    detector = GateDetector(model, gate)
    logits, _ = answers_and_scores(detector, few.pixels(slice(None)))
    right = few.subset(torch.nonzero(logits.argmax(1) == few.labels)[:, 0])
    evaluate = partial(robustness_curve, seed=seed)
    return {
        "right": len(right),
        "misclassified_and_accepted": share_fooled(
            detector, right, limit=gate.refused, epsilons=REAL_EPS, steps=2 * STEPS, evaluate=evaluate
        ),
        "pgd_noticed": [
            share_noticed(detector, right, limit=gate.refused, eps=eps, steps=STEPS, evaluate=evaluate)
            for eps in REAL_EPS
        ],
    }


def _area(own: torch.Tensor, other: torch.Tensor) -> float:
    from sklearn.metrics import roc_auc_score

    truth = np.r_[np.zeros(len(own)), np.ones(len(other))]
    return round(float(roc_auc_score(truth, np.r_[own.numpy(), other.numpy()])), 4)


def _against(score: Callable, test: torch.Tensor, sets: dict[str, torch.Tensor]) -> dict[str, float]:
    own = score(test)
    return {name: _area(own, score(images)) for name, images in sets.items()}


def _by_features(name: str, splits: DataSplits) -> Callable[[torch.Tensor], torch.Tensor]:
    """Mahalanobis distance (Lee et al., 2018, arXiv:1807.03888) of a network's features to those of its classes."""
    from pytorch_ood.detector import Mahalanobis

    model, _ = load_checkpoint(CHECKPOINTS / name)

    @torch.no_grad()
    def features(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([model.features(part) for part in images.split(64)])

    known = features(splits.train.pixels(slice(0, len(splits.train), 2)))
    centre = known.mean(0)
    torch.manual_seed(0)
    axes = torch.pca_lowrank(known, DIRECTIONS, niter=4)[2]
    detector = Mahalanobis(None).fit_features((known - centre) @ axes, splits.train.labels[::2])
    return lambda images: torch.as_tensor(detector.predict_features((features(images) - centre) @ axes))


def measure_heads(train: ImageSet, head: Volume, brain: Volume) -> dict[str, Any]:
    """How like the public slices those of two volumes are, level by level, and how wrong turns of the head fit."""
    means = [train.images[train.slices == level, 0].float().mean(0).numpy() for level in range(len(standard.LEVELS))]
    made = {"whole head": standardise(head), "stripped": standardise(brain, stripping=Stripping(stripped=True))}
    levels = {
        name: [round(correlation(one, mean), 4) for one, mean in zip(own.slices, means)] for name, own in made.items()
    }
    upright = [round(correlation(one[::-1], mean), 4) for one, mean in zip(made["stripped"].slices, means)]
    both = zip(made["whole head"].slices, made["stripped"].slices)
    return {
        "levels": levels | {"stripped, not turned upside down": upright},
        "agreement": [round(correlation(one, other), 4) for one, other in both],
        "fit": {name: own.facts for name, own in made.items()},
        "wrong_turns": [_wrong_turn(brain, number) for number in progress(WRONG_TURNS, "wrong turns")],
    }


def _wrong_turn(brain: Volume, number: int) -> dict[str, Any]:
    """How well a registration fits that starts from a turned head."""
    import SimpleITK as sitk

    inside = brain.with_voxels((brain.voxels > 0).astype(np.float32))
    template, scan, mask = template_image(), as_image(brain), as_image(inside)
    outline = sitk.Cast(template > 0, sitk.sitkFloat32)
    kind = sitk.CenteredTransformInitializerFilter.MOMENTS
    start = sitk.AffineTransform(sitk.CenteredTransformInitializer(outline, mask, sitk.AffineTransform(3), kind))
    start.SetMatrix(standard.turns()[number].ravel().tolist())
    told = fit_of(template, scan, mask, register(template, scan, start))
    return {name: told[name] for name in ("correlation", "overlap")}


def gate_figure(found: dict[str, Any], note: str) -> Figure:
    """Distances of each set to the nearest training slice, and the gate's two limits."""
    figure, axes = axes_of(size=(8, 0.34 * len(found["distances"]) + 1.6))
    ax = axes[0, 0]
    for place, values in enumerate(found["distances"].values()):
        colour = COLOURS[0] if place == 0 else COLOURS[1]
        ax.scatter(values, np.full(len(values), place), s=6, alpha=0.25, color=colour, linewidths=0)
    for name, style in (("doubtful", ":"), ("refused", "--")):
        ax.axvline(found["limits"][name], color="black", linestyle=style, linewidth=1, label=f"{name} above")
    ax.set(yticks=range(len(found["distances"])), yticklabels=list(found["distances"]))
    ax.set_xlabel("distance to the nearest training slice")
    ax.invert_yaxis()
    ax.legend(fontsize=8)
    return finish(figure, "The gate accepts slices of unknown patients and refuses what is not like them", note)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parse(arguments)
    try:
        splits = load_splits(args.data)
        if splits.info["protocol"] != "patient" or min(splits.train.slices.tolist()) < 0:
            raise ValueError(f"{args.data} must be split by patient, with the order of the slices known")
        head, brain = read_volume(args.head), read_volume(args.stripped)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    sets = foreign_sets(splits.test, head, brain, args.seed)
    gate = fit_gate(splits.train, splits.validation)
    found = measure_gate(gate, splits, sets, args.models)
    found |= {"attacked": attack_gate(gate, splits.test, sets, args.attacked, args.seed)}
    content: dict[str, Any] = {
        "gate": found,
        "heads": measure_heads(splits.train, head, brain),
        "volumes": [args.head.name, args.stripped.name],
        "seed": args.seed,
        "data": splits.info,
    }
    note = f"{found['test']['slices']} test slices of {found['test']['patients']} patients; {splits.info['source']}"
    save("scans", content, gate_figure(found, note), args.out)
    return 0


def _rounded(distances: torch.Tensor) -> list[float]:
    return [round(value, 3) for value in distances.tolist()]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scans", description="The gate, and whole heads")
    add = parser.add_argument
    add("--head", type=Path, required=True, help="T1 volume of a whole head")
    add("--stripped", type=Path, required=True, help="the same without its skull")
    add("--data", type=Path, default=DATASET_VARIABLES, help="folder of prepared *_set.pt, split by patient")
    add("--models", nargs="*", default=["EfficientNetB0", "ResNet34"], help="whose features are asked, too")
    attacked = ["EfficientNetB0", "EfficientNetB0_atk"]
    add("--attacked", nargs="*", default=attacked, help="models that are attacked together with the gate")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=FOLDER)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
