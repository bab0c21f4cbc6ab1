"""Make trained models ready for scans of one's own."""

from __future__ import annotations

from pathlib import Path

from utils.commands.boundary import command
from utils.data.sets import load_splits
from utils.data.workspace import Workspace
from utils.experiments.calibrate import calibrate
from utils.experiments.records import trained_models
from utils.training.checkpoints import WEIGHTS, checkpoint_folder


@command("python -m utils calibrate")
def main(*, model: tuple[str, ...] = (), data: Path | None = None, root: Path | None = None) -> None:
    """Fit what python -m utils predict needs: which images a model knows, and how right its answers are.

    Args:
        model: folders in checkpoints/, or paths; a vote, too. Without it all that have weights.
        data: folder of the prepared *_set.pt that the models were trained on; without it dataset/dataset_variables.
        root: holds checkpoints/; without it this repository.
    """
    workspace = Workspace.open(str(root or ""), data_dir=str(data or ""))
    names = model or tuple(n for n in trained_models(workspace) if (workspace.checkpoint(n) / WEIGHTS).is_file())
    if not names:
        raise FileNotFoundError(f"no weights in {workspace.root / 'checkpoints'}")
    splits = load_splits(workspace.data_dir)
    for name in names:
        folder = checkpoint_folder(name if Path(name).is_dir() else workspace.checkpoint(name))
        found = calibrate(workspace, folder, splits)
        for kind, own in (("patients", found.patient), ("slices", found.slice)):
            if own:
                told = ", ".join(f"{answer}: {right} of {n} right" for answer, (n, right) in own.right.items())
                print(f"{folder.name}, test {kind}: {told}", flush=True)
