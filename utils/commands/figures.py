"""Draw the figures of the models again, from their records."""

from __future__ import annotations

import argparse
from pathlib import Path

from utils.attacks.suites import SUITES
from utils.commands.boundary import command
from utils.core.paths import ROOT
from utils.core.radii import parse_radius
from utils.data.sets import load_splits
from utils.data.workspace import Workspace
from utils.experiments.records import known_titles
from utils.reporting.figures import redraw, save_hero
from utils.reporting.robustness_figures import NOTEBOOKS, draw_all
from utils.reporting.style import save_figure
from utils.training.checkpoints import RECORD


@command
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m utils figures", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="holds checkpoints/ and assets/; default: this repository"
    )
    parser.add_argument("--data", help="folder of prepared *_set.pt; without it, pictures of slices stay as they are")
    known = known_titles()
    parser.add_argument("--models", nargs="+", metavar="TITLE", help=f"default: all there are of {' '.join(known)}")
    parser.add_argument(
        "--hero", metavar="TITLE", help="only draw assets/hero.png, with this model and its hardened twin"
    )
    parser.add_argument("--eps", default="2/255", help="radius for --hero, such as 2/255 or 0.005 (default 2/255)")
    args = parser.parse_args(arguments)
    eps = parse_radius(args.eps)
    if args.hero and not args.data:
        raise ValueError("--hero needs --data, the folder of the prepared images")
    workspace = Workspace.open("" if args.root == ROOT else str(args.root), data_dir=args.data or "")
    splits = load_splits(workspace.data_dir) if args.data else None
    if args.hero and splits:
        print(*save_hero(workspace, args.hero, splits, eps), sep="\n")
        return 0
    titles = args.models or [title for title in known if (workspace.checkpoint(title) / RECORD).is_file()]
    if not titles:
        raise FileNotFoundError(f"no records in {workspace.root / 'checkpoints'}; run a notebook first")
    for title in titles:
        for path in redraw(workspace, title, splits):
            print(path)
    # weak suites first, so that where a figure is drawn twice the stronger one stays
    for suite in (NOTEBOOKS, *SUITES):
        for path, figure in draw_all(workspace, suite).items():
            print(save_figure(figure, path))
    return 0
