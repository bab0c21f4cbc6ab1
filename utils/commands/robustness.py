"""Measure the robustness of a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path

from utils.attacks.suites import SUITES, Threat
from utils.commands.boundary import command
from utils.core.paths import check_writable, write_json
from utils.core.precision import PRECISIONS
from utils.core.processes import is_main, join_others
from utils.core.radii import CHECK_EPS, GRIDS, parse_radius
from utils.data.sets import load_splits
from utils.data.workspace import Workspace, pick_device
from utils.experiments.records import ENSEMBLE, load_vote
from utils.experiments.robustness import PANEL_IMAGES, evaluate_robustness, record_path
from utils.training.checkpoints import checkpoint_folder, load_checkpoint, read_record


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
    parser = argparse.ArgumentParser(prog="python -m utils robustness", description="Robustness of a trained model")
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
