"""Robustness of a trained model with everything that a reader needs to believe it, as one JSON file.

    python -m utils.robustness --model ResNet34 --data dataset/dataset_variables --suite standard

The worst case of each image over a suite of attacks at growing radii, all metrics with intervals over patients,
and the gradient checks. A killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.checkpoints import checkpoint_folder, load_checkpoint, read_record
from utils.command import command
from utils.data import ImageSet, load_splits
from utils.ensemble import Vote
from utils.intervals import report, share_interval
from utils.masking import masking_panel
from utils.paths import check_writable, write_json
from utils.precision import PRECISIONS
from utils.processes import is_main, join_others
from utils.radii import CHECK_EPS, GRIDS, check_eps, parse_radius
from utils.reproducibility import environment_facts
from utils.results import ENSEMBLE, load_vote
from utils.suites import SUITES, Attack, Threat, check_suite
from utils.vote_attacks import attack_vote
from utils.workspace import Workspace, pick_device
from utils.worst_case import NEVER, RobustnessCurve, robustness_curve

PANEL_IMAGES = 128


def evaluate_robustness(
    model: nn.Module,
    images: ImageSet,
    *,
    suite: str = "standard",
    epsilons: Sequence[float] | None = None,
    names: Sequence[str] = (),
    threat: Threat | None = None,
    panel: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    compiled: bool = False,
    cache: Path | None = None,
) -> dict[str, Any]:
    """The whole protocol on one model or vote.

    Args:
        suite: a key of :data:`utils.suites.SUITES`.
        epsilons: radii; 0 is added. None takes the grid of the threat's norm.
        names: of a vote's members.
        panel: ``panel_images``, ``panel_eps``, ``queries`` of :func:`judge`.
        precision, compiled: of the attacks; the panel's are always made in float32 by the model as it is.
        cache: folder for finished batches.
        images, threat, seed, batch_size, device: see :func:`utils.worst_case.robustness_curve`.

    Returns:
        what :func:`judge` returns, and ``suite``, ``precision``, ``compiled``, and ``vote`` for a vote (see
        :func:`utils.vote_attacks.attack_vote`).

    Raises:
        ValueError: an unknown suite, a vote to be compiled; also see :func:`utils.worst_case.robustness_curve`.
    """
    attacks = check_suite(suite)
    epsilons = GRIDS[(threat or Threat()).norm] if epsilons is None else epsilons
    options = {"threat": threat, "seed": seed, "batch_size": batch_size, "device": device, "cache": cache}
    record: dict[str, Any] = {"suite": suite, "precision": precision, "compiled": compiled}
    own = options | {"precision": precision}
    if not isinstance(model, Vote):
        curve = robustness_curve(model, images, attack=attacks, epsilons=epsilons, compiled=compiled, **own)
    elif compiled:
        raise ValueError("a vote is attacked through many models, each of which would be compiled: leave --compile out")
    else:
        curve, record["vote"] = attack_vote(model, images, epsilons=epsilons, suite=suite, names=names, **own)
    return record | judge(model, images, curve, attacks=attacks, **(panel or {}), **options)


def judge(
    model: nn.Module,
    images: ImageSet,
    curve: RobustnessCurve,
    *,
    attacks: Sequence[Attack],
    panel_images: int = PANEL_IMAGES,
    panel_eps: float | None = None,
    queries: int = 500,
    **options: Any,
) -> dict[str, Any]:
    """What is reported of a worst case: all metrics with intervals over patients, and whether to believe it.

    Args:
        curve: of ``model`` on ``images``.
        attacks: that the curve was made with.
        panel_images: the masking panel looks at so many images, spread over patients; 0 leaves it out.
        panel_eps: radius of the panel; None takes that of the threat's norm, 0 leaves it out.
        queries: of Square in the panel.
        options: ``threat``, ``seed``, ``batch_size``, ``device``, ``cache`` of
            :func:`utils.worst_case.robustness_curve`.

    Returns:
        plain values: ``curve``; ``interval`` of robust accuracy by radius; ``metrics`` by radius (see
        :func:`utils.intervals.report`); ``answers`` without attack; ``seed``; ``environment``; ``panel``, or None.
    """
    record = {**summarise(curve, images), "seed": options.get("seed", 0), "panel": None}
    norm = curve.threat["norm"]
    panel_eps = CHECK_EPS[norm] if panel_eps is None else check_eps(panel_eps, norm)
    record["environment"] = environment_facts()  # a model may be attacked elsewhere and later than it was trained
    if panel_images and panel_eps:
        few = images.balanced_subset(panel_images)
        radii = {"epsilons": curve.epsilons, "eps": panel_eps}
        record["panel"] = masking_panel(model, few, attacks=attacks, queries=queries, **radii, **options).as_dict()
    return record


def summarise(curve: RobustnessCurve, images: ImageSet, *, seed: int = 0) -> dict[str, Any]:
    """A curve as plain values, with intervals over patients, all metrics at each radius, and each clean answer."""
    first = torch.tensor(curve.first_broken)
    sure, said = curve.logits[0].softmax(1).max(1)
    standing = [(first == NEVER) | (first > step) for step in range(len(curve.epsilons))]
    return {
        "curve": curve.as_dict(),
        "interval": [share_interval(flags, images.subjects, seed=seed) for flags in standing],
        "metrics": [report(logits, images, seed=seed) for logits in curve.logits],
        "answers": {
            "probability": [round(value, 4) for value in sure.tolist()],
            "right": (said == images.labels).tolist(),
        },
    }


def record_path(folder: Path, suite: str, threat: Threat, n_images: int | None = None) -> Path:
    """Where the record of an evaluation lies."""
    parts = ["robustness", suite, *([threat.norm] if threat.norm != "linf" else [])]
    parts += [f"untied{threat.size}"] if threat.size else []
    parts += [f"n{n_images}"] if n_images else []
    return folder / f"{'_'.join(parts)}.json"


@command
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parse(arguments)
    join_others()
    threat = Threat(norm=args.norm, size=args.untied)
    epsilons, check_radius = _radii(args)
    _check_counts(args)
    workspace = Workspace.open("" if args.root is None else str(args.root), data_dir=args.data or "")
    folder = checkpoint_folder(args.model if Path(args.model).is_dir() else workspace.checkpoint(args.model))
    stored = read_record(folder)
    target = args.out or record_path(folder, args.suite, threat, args.max_images)
    check_writable(target)
    splits = load_splits(workspace.data_dir)
    fits = {"classes": splits.classes, "fingerprint": splits.fingerprint}
    device = pick_device()
    vote = folder.name == ENSEMBLE
    model = load_vote(workspace, stored, **fits) if vote else load_checkpoint(folder, **fits)[0]
    test = splits.test.balanced_subset(args.max_images) if args.max_images else splits.test
    print(f"{folder.name}, suite {args.suite}, {threat.title}, {len(test)} test images on {device}", flush=True)
    found = evaluate_robustness(
        model.to(device),
        test,
        suite=args.suite,
        epsilons=epsilons,
        names=stored["vote"]["members"] if vote else (),
        threat=threat,
        panel={"panel_images": args.panel_images, "panel_eps": check_radius},
        seed=args.seed,
        batch_size=args.batch_size,
        device=device,
        precision=args.precision,
        compiled=args.compile,
        cache=workspace.attack_cache,
    )
    own = {"title": folder.name, "classes": splits.classes, "data": splits.info, "note": stored.get("note", "")}
    if is_main():
        write_json(target, own | found)
        print(target)
    return 0


def _radii(args: argparse.Namespace) -> tuple[list[float], float]:
    """The radii to attack at and that of the gradient checks, as they were typed or as the norm has them."""
    typed = args.epsilons or []
    epsilons = [parse_radius(text, args.norm) for text in typed] or list(GRIDS[args.norm])
    check = CHECK_EPS[args.norm] if args.check_eps is None else parse_radius(args.check_eps, args.norm)
    return epsilons, check


def _check_counts(args: argparse.Namespace) -> None:
    """Refuse now what would fail, or mean something else, after hours of attacks."""
    for name, value, least in (
        ("--max-images", args.max_images, 1),
        ("--panel-images", args.panel_images, 0),
        ("--batch-size", args.batch_size, 1),
        ("--seed", args.seed, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m utils.robustness", description="Robustness of a trained model")
    add = parser.add_argument
    add("--model", required=True, help="folder in checkpoints/, Ensemble too, or a path")
    add("--data", help="folder of prepared *_set.pt; default: dataset/dataset_variables")
    add("--root", type=Path, help="holds checkpoints/; default: this repository")
    add("--suite", choices=SUITES, default="standard")
    add("--epsilons", nargs="+", metavar="EPS", help="such as 1/255 or 0.005, or L2 lengths; default: the norm's grid")
    add("--norm", choices=("linf", "l2"), default="linf")
    add("--untied", type=int, metavar="SIDE", help="attack three colour planes of this side instead of the grey image")
    add("--max-images", type=int, help="attack so many test images, spread over patients; default: all")
    add("--panel-images", type=int, default=PANEL_IMAGES, help="images of the gradient checks; 0 leaves them out")
    add("--check-eps", "--panel-eps", metavar="EPS", help="radius of the gradient checks (default 2/255, or L2 1)")
    add("--batch-size", type=int, default=64)
    add("--precision", choices=PRECISIONS, default="fp32", help="of the attacks' passes; answers count in float32")
    add("--compile", action="store_true", help="fuse the attacks' passes first; takes a minute, pays on EfficientNet")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="file to write; default: beside the model's record")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
