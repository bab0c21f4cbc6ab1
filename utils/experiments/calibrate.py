"""Make a trained model ready to be asked about scans of one's own: gate, temperature, threshold, measured errors.

    python -m utils calibrate --model ResNet34

Everything is fitted and chosen on validation patients; how such answers turn out is measured on the test patients.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from utils.core.paths import file_digest
from utils.data.sets import DataSplits, ImageSet, data_note
from utils.data.workspace import Workspace, pick_device
from utils.evaluation.calibration import Calibration, Outcomes, with_outcomes
from utils.evaluation.gate import fit_gate
from utils.evaluation.metrics import merge_by_patient, predict
from utils.experiments.records import load_vote
from utils.training.checkpoints import WEIGHTS, load_checkpoint, read_record
from utils.training.outcomes import fit_outcomes
from utils.training.record import VoteRecord

#: Logits or log-probabilities N x K, and labels N.
_Answers = tuple[torch.Tensor, torch.Tensor]


def weights_of(workspace: Workspace, folder: Path) -> dict[str, str]:
    """SHA-256 of the weights of a model, or of each member of a vote, by title."""
    record = read_record(folder)
    if isinstance(record, VoteRecord):
        return {title: file_digest(workspace.checkpoint(title) / WEIGHTS) for title in record.vote.members}
    return {folder.name: file_digest(folder / WEIGHTS)}


def calibrate(workspace: Workspace, folder: Path, splits: DataSplits) -> Calibration:
    """Write ``gate.safetensors`` and ``calibration.json`` into a checkpoint's folder.

    Args:
        workspace: where the members of a vote lie.
        folder: of a model or of a vote.
        splits: the data that it was trained on.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: it was trained on other data, or there are no validation images.
    """
    record, device = read_record(folder), pick_device()
    classes, fingerprint = splits.classes, splits.fingerprint
    model: nn.Module
    if isinstance(record, VoteRecord):
        model = load_vote(workspace, record, classes=classes, fingerprint=fingerprint)
    else:
        model = load_checkpoint(folder, classes=classes, fingerprint=fingerprint)[0]
    model.to(device)
    gate = fit_gate(splits.train, splits.validation)
    sides = splits.validation, splits.test
    validation, test = (predict(model, part, device=device) for part in sides)
    patients_fitted, patients_tested = _patients(validation, sides[0]), _patients(test, sides[1])
    known = len(patients_fitted[1]) and len(patients_tested[1])
    found = Calibration(
        classes=splits.classes,
        fingerprint=splits.fingerprint,
        weights_sha256=weights_of(workspace, folder),
        source=splits.info["source"],
        note=data_note(splits.info),
        slice=_measured((validation, sides[0].labels), (test, sides[1].labels), splits.classes, sides[1].subjects),
        patient=_measured(patients_fitted, patients_tested, splits.classes) if known else None,
    )
    gate.save(folder)
    found.save(folder)
    return found


def _patients(logits: torch.Tensor, images: ImageSet) -> _Answers:
    """Logarithm of each patient's mean probabilities, P x K, and the labels."""
    means, labels = merge_by_patient(logits.softmax(1), images)
    return means.clamp(min=1e-9).log(), labels


def _measured(
    validation: _Answers, test: _Answers, classes: list[str], subjects: torch.Tensor | None = None
) -> Outcomes:
    return with_outcomes(fit_outcomes(*validation, classes), *test, classes, subjects)
