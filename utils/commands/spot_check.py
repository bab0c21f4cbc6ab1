"""Compare models with their records."""

from __future__ import annotations

import argparse
from pathlib import Path

from utils.commands.boundary import command
from utils.data.workspace import Workspace
from utils.experiments.records import trained_models
from utils.experiments.spot_check import check
from utils.training.checkpoints import WEIGHTS, checkpoint_folder


def _weights(workspace: Workspace, title: str) -> Path:
    return workspace.checkpoint(title) / WEIGHTS


@command
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m utils spot-check", description="Compare models with their records")
    parser.add_argument("--model", nargs="+", help="folders in checkpoints/, or paths; default: all with weights")
    parser.add_argument("--data", help="folder of prepared *_set.pt; default: dataset/dataset_variables")
    parser.add_argument("--root", type=Path, help="holds checkpoints/; default: this repository")
    parser.add_argument("--worst-case", action="store_true", help="measure the record's worst case again")
    args = parser.parse_args(arguments)
    workspace = Workspace.open("" if args.root is None else str(args.root), data_dir=args.data or "")
    # of some models the repository holds the record alone
    names = args.model or [name for name in trained_models(workspace) if _weights(workspace, name).is_file()]
    if not names:
        raise FileNotFoundError(f"no weights in {workspace.root / 'checkpoints'}")
    for name in names:
        folder = checkpoint_folder(name if Path(name).is_dir() else workspace.checkpoint(name))
        print(check(folder, workspace.data_dir, worst_case=args.worst_case), flush=True)
    return 0
