"""Compare models with their records."""

from __future__ import annotations

from pathlib import Path

from utils.commands.boundary import command
from utils.data.workspace import Workspace
from utils.experiments.records import trained_models
from utils.experiments.spot_check import check
from utils.training.checkpoints import WEIGHTS, checkpoint_folder


def _weights(workspace: Workspace, title: str) -> Path:
    return workspace.checkpoint(title) / WEIGHTS


@command("python -m utils spot-check")
def main(
    *, model: tuple[str, ...] = (), data: Path | None = None, root: Path | None = None, worst_case: bool = False
) -> None:
    """Attack trained models on a few images and compare each answer with their records.

    Args:
        model: folders in checkpoints/, or paths; without it all that have weights.
        data: folder of prepared *_set.pt; without it dataset/dataset_variables.
        root: holds checkpoints/; without it this repository.
        worst_case: measure the record's worst case again.
    """
    workspace = Workspace.open(str(root or ""), data_dir=str(data or ""))
    # of some models the repository holds the record alone
    names = model or tuple(name for name in trained_models(workspace) if _weights(workspace, name).is_file())
    if not names:
        raise FileNotFoundError(f"no weights in {workspace.root / 'checkpoints'}")
    for name in names:
        folder = checkpoint_folder(name if Path(name).is_dir() else workspace.checkpoint(name))
        print(check(folder, workspace.data_dir, worst_case=worst_case), flush=True)
