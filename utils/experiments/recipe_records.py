"""What a comparison of recipes leaves in files: one of each run, and one of all of them."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from utils.core.parts import Part
from utils.data.sets import DataFacts
from utils.evaluation.metrics import Metrics
from utils.experiments.budget import BudgetPart
from utils.training.record import Epoch


class Side(Part):
    """Metrics of some images at each radius; the first is without attack."""

    epsilons: list[float] = []
    attacks: list[str]
    n_images: int
    n_subjects: int = 0
    metrics: list[Metrics]

    @model_validator(mode="after")
    def _whole(self) -> Side:
        if self.epsilons and len(self.metrics) != len(self.epsilons):
            raise ValueError(f"metrics of {len(self.metrics)} radii instead of {len(self.epsilons)}")
        return self


class TrainingTold(Part):
    """What a run tells of its training."""

    history: list[Epoch]
    seconds: float


class RunRecord(Part):
    """The file of one variant and seed.

    Attributes:
        specification: what its result depends on, beside its variant and its seed.
    """

    variant: str
    title: str
    seed: int
    model: dict[str, Any]
    training: TrainingTold
    budget: BudgetPart
    validation: Side
    test: Side
    data: DataFacts
    specification: dict[str, Any] = {}
    environment: dict[str, Any] = {}


class VariantRow(Part):
    """One variant over its seeds; ``values`` by column of :data:`COLUMNS`."""

    title: str
    seeds: list[int]
    minutes: float
    collapsed: int = 0
    values: dict[str, list[float | None]]


class RecipesSummary(Part):
    """All runs of one folder; ``winner`` was chosen by validation patients."""

    winner: str | None
    chosen_by: str
    variants: dict[str, VariantRow]
    baselines: dict[str, Metrics]
    attacks: list[str]
    n_images: int
    n_subjects: int
    model: dict[str, Any]
    budget: BudgetPart
    data: DataFacts
    environment: dict[str, Any] = {}
