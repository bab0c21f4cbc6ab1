"""Where one run reads and writes: the repository itself, or a folder of its own for a quick run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from utils.core.paths import ROOT, read_json
from utils.data.sets import DataSplits, data_note

PROFILES = ("quick", "full")


@dataclass(frozen=True)
class Workspace:
    """Folders and remarks of one run.

    Attributes:
        root: holds ``assets/``, ``checkpoints/`` and, unless ``data_dir`` says otherwise, ``data/``.
        profile: ``full``, or ``quick``, whose numbers mean nothing.
        data_dir: folder of the ``*_set.pt`` files.
    """

    root: Path
    profile: str
    data_dir: Path

    @classmethod
    def open(cls, out_dir: str = "", *, profile: str = "full", data_dir: str = "") -> Workspace:
        """Resolve the notebooks' parameters; empty strings mean the repository's own folders.

        Raises:
            ValueError: unknown profile, or a quick run that would write over the repository.
        """
        if profile not in PROFILES:
            raise ValueError(f"profile must be one of {PROFILES}, not {profile!r}")
        root = Path(out_dir).expanduser().resolve() if out_dir else ROOT
        if profile == "quick" and root == ROOT:
            raise ValueError("a quick run must not write over the repository: set out_dir to a folder of its own")
        own_data = ROOT / "dataset" / "dataset_variables" if root == ROOT else root / "data"
        return cls(root, profile, Path(data_dir).expanduser().resolve() if data_dir else own_data)

    def assets(self, title: str) -> Path:
        """Folder of one model's figures."""
        return self.root / "assets" / title

    def data_assets(self, source: str) -> Path:
        """Folder of the figures of a data set: ``Dataset``, or one of its own where that shows another source."""
        common = self.assets("Dataset")
        audit = common / "leak_audit.json"
        other = audit.is_file() and read_json(audit)["data"]["source"] != source
        return self.assets(f"Dataset_{source}") if other else common

    def checkpoint(self, title: str) -> Path:
        """Folder of one model's weights and record."""
        return self.root / "checkpoints" / title

    @property
    def attack_cache(self) -> Path:
        """Folder of finished batches of attacks."""
        return self.root / "attack_cache"

    def hyperparams(self, title: str) -> Path:
        """File of one model's hyperparameters."""
        return self.root / "checkpoints" / "optuna_params" / f"{title}.json"

    def note(self, splits: DataSplits) -> str:
        """What every figure and record of this run must say about its numbers, or nothing."""
        quick = "quick run: these numbers mean nothing" if self.profile == "quick" else ""
        return "; ".join(filter(None, [quick, data_note(splits.info)]))


def pick_device() -> torch.device:
    """The device that training takes too: a CUDA GPU, else Apple's, else the CPU.

    Accelerate chooses in this order, and an attack elsewhere would be of another program than was trained.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
