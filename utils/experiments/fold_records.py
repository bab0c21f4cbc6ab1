"""What cross-validation leaves in files: one of each fold, and one of all of them."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import model_validator

from utils.core.parts import Part
from utils.data.sets import DataFacts, ImageSet
from utils.evaluation.intervals import MeanAuroc
from utils.evaluation.masking import Panel
from utils.evaluation.metrics import Levels, Metrics, Scores
from utils.experiments.budget import BudgetPart

#: The baseline of published weights, of which nothing but the last layer is fitted; see :mod:`utils.evaluation.probe`.
FROZEN = "frozen features"


class FoldData(DataFacts):
    """The data of one fold."""

    fold: int
    n_folds: int
    fold_seed: int


class Whose(Part):
    """Labels, patients and places in their chains of some images; older files do not tell the places."""

    labels: list[int]
    subjects: list[int]
    slices: list[int] = []

    @classmethod
    def of(cls, images: ImageSet) -> Whose:
        """Those of a set."""
        return cls(labels=images.labels.tolist(), subjects=images.subjects.tolist(), slices=images.slices.tolist())

    def bare(self, classes: list[str]) -> ImageSet:
        """A set of these images without their pixels."""
        n = len(self.labels)
        return ImageSet(
            torch.zeros((n, 1, 1, 1), dtype=torch.uint8),
            torch.tensor(self.labels),
            torch.tensor(self.subjects),
            torch.tensor(self.slices) if self.slices else torch.full((n,), -1),
            torch.zeros(n, dtype=torch.bool),
            [""] * n,
            list(classes),
        )


class FoldModel(Part):
    """One model of a fold.

    Attributes:
        training: see :class:`utils.training.record.TrainingFacts`.
        validation: logits of all validation images; older files do not tell them.
        logits: of all test images.
        attacked: at each radius, of the worst images found for the attacked ones.
        checks: the gradient checks; None where they were left out.
    """

    training: dict[str, Any]
    validation: list[list[float]] = []
    logits: list[list[float]]
    attacked: list[list[list[float]]]
    checks: Panel | None = None


class FoldRecord(Part):
    """All answers of one fold.

    Attributes:
        specification: what all folds of an experiment share.
        epsilons: radii of ``attacked``, the first 0.
        baselines: name -> logits of all test images.
        members: name -> SHA-256 of the weights of each model that was combined; empty in other and in older files.
    """

    data: FoldData
    specification: dict[str, Any] = {}
    budget: BudgetPart
    model: dict[str, Any]
    seed: int
    epsilons: list[float]
    attacks: list[str]
    classes: list[str]
    validation: Whose | None = None
    test: Whose
    attacked: Whose
    baselines: dict[str, list[list[float]]]
    models: dict[str, FoldModel]
    members: dict[str, str] = {}
    environment: dict[str, Any] = {}

    @model_validator(mode="after")
    def _whole(self) -> FoldRecord:
        if not 0 <= self.data.fold < self.data.n_folds:
            raise ValueError(f"there are folds 0 to {self.data.n_folds - 1}, and this is fold {self.data.fold}")
        for name, logits in self.baselines.items():
            self._check(f"baseline {name}", logits, self.test)
        for name, model in self.models.items():
            self._check(f"{name}, logits", model.logits, self.test)
            if model.validation:
                self._check(f"{name}, validation", model.validation, self.validation or Whose(labels=[], subjects=[]))
            if len(model.attacked) != len(self.epsilons):
                told = f"answers at {len(model.attacked)} radii instead of {len(self.epsilons)}"
                raise ValueError(f"{name}, attacked: {told}")
            for logits in model.attacked:
                self._check(f"{name}, attacked", logits, self.attacked)
        return self

    def _check(self, what: str, logits: list[list[float]], whose: Whose) -> None:
        """One answer for each image, one value for each class."""
        if len(logits) != len(whose.labels):
            raise ValueError(f"{what}: {len(logits)} answers to {len(whose.labels)} images")
        if any(len(row) != len(self.classes) for row in logits):
            raise ValueError(f"{what}: an answer that does not have {len(self.classes)} values")


class FoldsRow(Part):
    """One model over all folds.

    Attributes:
        metrics: at each radius, over the patients of all folds.
        auroc_by_fold: at each radius, of two classes by patient, of each fold by itself.
        attacked: the same on the attacked images alone, also without attack.
        at_threshold: at each radius, scores of two classes by patient where each fold decides at the threshold that is
            best on its validation patients; None where these answers were not kept.
        ranking: at each radius, the mean over folds of the AUROC by patient, ill against healthy; without attack on all
            test images, else on the attacked ones. Empty where no class is known to mean healthy.
        checks: the gradient checks of each fold that made them.
        gains: name of another row -> the difference of ``ranking``, this one minus that one, in pairs.
    """

    metrics: list[Metrics]
    auroc_by_fold: list[list[float | None]]
    attacked: FoldsRow | None = None
    at_threshold: list[Scores] | None = None
    ranking: list[MeanAuroc] = []
    checks: list[Panel] = []
    gains: dict[str, list[MeanAuroc]] = {}


class Counts(Part):
    """How many test images, and how many of them attacked."""

    test: int
    attacked: int


class FoldsData(Part):
    """The data of all folds."""

    source: str
    protocol: str
    n_folds: int
    fold_seed: int


class FoldsSummary(Part):
    """All folds together; ``rows`` holds baselines and models."""

    folds: list[int]
    rows: dict[str, FoldsRow]
    epsilons: list[float]
    attacks: list[str]
    classes: list[str]
    budget: BudgetPart
    model: dict[str, Any]
    seed: int
    n_images: Counts
    n_subjects: int
    data: FoldsData
    environment: dict[str, Any] = {}


def binary_by_patient(found: Metrics) -> Any:
    """The scores of two classes by patient; of all classes where these are others."""
    levels: Levels = found.get("binary", next(iter(found.values())))
    return levels.patient
