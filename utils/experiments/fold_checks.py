"""The gradient checks of the models of a fold, so that their numbers are not owed to hidden gradients."""

from __future__ import annotations

from pathlib import Path

import torch

from utils.attacks.suites import SUITES
from utils.core.paths import write_json
from utils.core.radii import CHECK_EPS
from utils.data.sets import DataSplits
from utils.data.workspace import pick_device
from utils.evaluation.masking import masking_panel
from utils.evaluation.metrics import predict
from utils.experiments.fold_records import FoldModel, FoldRecord
from utils.experiments.folds import model_folders, read_fold
from utils.experiments.recipes import EPSILONS
from utils.training.checkpoints import is_trained, load_checkpoint

#: By how much an answer may differ from the stored one: it was rounded, and machines differ.
_TOLERANCE = 0.02


def check_fold(target: Path, splits: DataSplits, *, work: Path, images: int) -> None:
    """Make the gradient checks of both models of a finished fold, where they are not made, and store them there.

    Args:
        target: file of the fold, of :func:`utils.experiments.folds.run_fold`.
        splits: of :func:`utils.experiments.folds.fold_of`.
        work: folder of its weights.
        images: the checks look at so many test images, spread over patients.

    Raises:
        FileNotFoundError: no weights in ``work``.
        ValueError: weights of another run: their answers are not those of the file.
    """
    check_weights(target, work, images)
    record = read_fold(target)
    for name, folder in model_folders(work).items():
        own = record.models[name]
        if _made(own, record, images):
            continue
        record.models[name] = _checked(own, record, splits, folder, work, images)
        write_json(target, record.plain())


def check_weights(target: Path, work: Path, images: int) -> None:
    """See that there are weights for the checks that a finished fold lacks.

    Args:
        target, work, images: see :func:`check_fold`; a fold that is not made yet leaves its weights.

    Raises:
        FileNotFoundError: there are none.
    """
    if not target.is_file():
        return
    record = read_fold(target)
    for name, folder in model_folders(work).items():
        if not _made(record.models[name], record, images) and not is_trained(folder):
            raise FileNotFoundError(
                f"no model in {folder}, whose gradient checks were asked for: give --work of the run that made this "
                "fold, or another --out to train it again"
            )


def _made(own: FoldModel, record: FoldRecord, images: int) -> bool:
    return own.checks is not None and own.checks.n_images == min(images, len(record.test.labels))


def _checked(
    own: FoldModel, record: FoldRecord, splits: DataSplits, folder: Path, work: Path, images: int
) -> FoldModel:
    device = pick_device()
    model, stored = load_checkpoint(folder, classes=splits.classes, fingerprint=splits.fingerprint)
    model.to(device)
    answers = predict(model, splits.test, device=device).cpu()
    away = (answers - torch.tensor(own.logits)).abs().max().item()
    if away > _TOLERANCE or stored.trained.plain() != own.training:
        raise ValueError(
            f"{folder} holds another model than fold {record.data.fold} had: its training or its logits differ "
            f"(these by up to {away:.2g}); give --work of the run that made this fold"
        )
    panel = masking_panel(
        model,
        splits.test.balanced_subset(images),
        epsilons=EPSILONS,
        eps=CHECK_EPS["linf"],
        attacks=SUITES[record.budget.suite],
        seed=record.seed,
        device=device,
        cache=work / "attack_cache",
    )
    return own.model_copy(update={"checks": panel})
