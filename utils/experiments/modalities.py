"""Two modalities of the same patients: each has its models, and they answer together by patient."""

from __future__ import annotations

import pandas as pd
import torch
from torch import nn

from utils.data.sets import DataSplits, load_splits
from utils.data.workspace import Workspace
from utils.evaluation.ensemble import Vote
from utils.evaluation.fusion import Fused, fuse, refuse_leak
from utils.evaluation.intervals import merge_classes, questions, with_intervals
from utils.evaluation.metrics import Scores, predict, scores
from utils.experiments.records import HARDENED, load_members, trained_models

FIRST, SECOND, TOGETHER = "first modality", "second modality", "both, late fusion"


def late_fusion(
    splits: DataSplits, vote: nn.Module, second: str, *, device: torch.device | str = "cpu"
) -> pd.DataFrame | str:
    """Both votes on the patients of both test sides, alone and together.

    Args:
        splits: of the first modality.
        vote: of its models.
        second: folder of a workspace with data and hardened models of another modality of the same patients, as
            ``python -m utils reproduce --out`` makes one; "" fuses nothing.

    Returns:
        a table, or a sentence that says how to get one.

    Raises:
        FileNotFoundError: no data or no hardened models in that folder.
        ValueError: see :func:`utils.evaluation.fusion.refuse_leak` and :func:`utils.evaluation.fusion.fuse`.
    """
    if not second:
        return "one modality; set second_dir to the folder of another one of the same patients"
    workspace = Workspace.open(second)
    others = load_splits(workspace.data_dir)
    refuse_leak({FIRST: splits, SECOND: others})
    titles = [title for title in trained_models(workspace) if title.endswith(HARDENED)]
    if not titles:
        raise FileNotFoundError(f"no hardened models in {workspace.root / 'checkpoints'}")
    members = load_members(workspace, titles, classes=others.classes, fingerprint=others.fingerprint)
    other = Vote([model.to(device) for model in members.values()]).to(device)
    answers = {
        FIRST: (predict(vote, splits.test, device=device), splits.test),
        SECOND: (predict(other, others.test, device=device), others.test),
    }
    return fusion_table(fuse(answers), splits.classes)


def fusion_table(found: Fused, classes: list[str]) -> pd.DataFrame:
    """Accuracy, balanced accuracy and AUROC by patient in percent, with 95 % intervals over patients; a row a modality.

    Args:
        classes: in label order; where one means healthy, it is asked against the rest.
    """
    asked = questions(classes)
    names, groups = asked.get("binary", next(iter(asked.values())))
    labels = torch.tensor(groups)[found.labels]
    rows = {}
    for title, chances in {**found.each, TOGETHER: found.probabilities}.items():
        merged = merge_classes(chances, groups)
        own = with_intervals(scores(merged, labels, list(names)), merged, labels, torch.arange(len(labels)))
        rows[title] = {
            "patients": str(len(labels)),
            **{title: _told(own, name) for name, title in _COLUMNS.items()},
        }
    return pd.DataFrame.from_dict(rows, orient="index")


_COLUMNS = {"accuracy": "accuracy", "balanced_accuracy": "balanced", "auroc": "AUROC"}


def _told(own: Scores, name: str) -> str:
    value, bounds = getattr(own, name), own.interval.get(name)
    if value is None:
        return "-"
    low, high = bounds or (float("nan"),) * 2
    return f"{100 * value:.1f} [{100 * low:.0f}, {100 * high:.0f}]"
