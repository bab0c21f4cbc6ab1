"""The record of a model or of a vote: how it was made, and all that was measured of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import field_validator, model_validator
from typing_extensions import Self

from utils.core.parts import Part, parsed
from utils.core.paths import read_json
from utils.data.sets import DataFacts
from utils.evaluation.curve import RobustnessCurve
from utils.evaluation.metrics import Levels, Metrics, Scores
from utils.evaluation.robustness import WorstCase

#: Version of the records that are written; those without a number are of version 1.
SCHEMA = 2
_TRAIN_AGAIN = "train the model again, or put its record back"


#: What :func:`utils.training.loop.train` tells of one epoch; ``collapsed`` is a bool.
Epoch = dict[str, float | bool]


class Environment(Part):
    """Where and when; see :func:`utils.core.reproducibility.environment_facts`."""

    created: str
    hardware: str


class Architecture(Part):
    """What must be equal for weights to fit."""

    backbone: str
    num_classes: int
    image_size: int


class ObjectiveFacts(Part):
    """Recipe of a training, see :mod:`utils.training.objectives`; a radius is 0 where nothing was attacked."""

    name: str
    eps: float = 0.0
    steps: int = 0
    adv_weight: float = 1.0

    @property
    def hardens(self) -> bool:
        """Whether the training attacked."""
        return self.name != "standard"


class ConfigFacts(Part):
    """Settings of a training, see :class:`utils.training.config.TrainConfig`."""

    learning_rate: float
    precision: str
    seed: int
    layer_decay: float = 1.0
    validation_images: int | None = None


class TrainingFacts(Part):
    """One training.

    Attributes:
        start: name of the weights that it began with.
        best_epoch: from 0, whose weights were kept; chosen by the figure ``selected_by`` of ``history``.
        history: an entry an epoch, see :func:`utils.training.loop.train`.
        specification: settings beside ``config`` and ``objective`` by which the run is known again.
    """

    objective: ObjectiveFacts
    config: ConfigFacts
    start: str
    best_epoch: int
    selected_by: str
    seconds: float
    history: list[Epoch]
    specification: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _of_an_epoch(self) -> Self:
        if self.history and not 0 <= self.best_epoch < len(self.history):
            raise ValueError(f"best_epoch {self.best_epoch} is none of the {len(self.history)} epochs of its history")
        return self


class ExamplesFacts(Part):
    """How a picture of attacked slices was made: values of the parameter, and for each [budget, radius]."""

    values: list[float]
    parameter_type: str
    attacks: list[tuple[dict[str, Any], float]]

    @field_validator("attacks", mode="before")
    @classmethod
    def _as_pairs(cls, value: Any) -> Any:
        """JSON has no tuples."""
        return [tuple(pair) for pair in value] if isinstance(value, list) else value


class StepSizeFacts(Part):
    """Accuracy under PGD by its step size; see :func:`utils.evaluation.transfer.step_size_sweep`."""

    alphas: list[float]
    accuracy: list[float]
    eps: float
    steps: int
    clean: float
    n_images: int | None = None
    n_subjects: int | None = None


class TransferFacts(Part):
    """Accuracy of each member (second key) on images made to fool another one (first key)."""

    eps: float
    attack: str
    accuracy: dict[str, dict[str, float]]
    n_images: int | None = None


class SpotCheck(Part):
    """At which radius each of a few images is first misclassified; see :mod:`utils.experiments.spot_check`."""

    suite: str
    epsilons: list[float]
    paths: list[str]
    first_broken: list[int]

    @model_validator(mode="after")
    def _as_long(self) -> Self:
        if len(self.paths) != len(self.first_broken):
            raise ValueError("paths and first_broken must be as long as each other")
        return self


class Record(Part):
    """What models and votes have in common.

    Attributes:
        note: what must be said wherever the numbers are shown.
        test: of all test images, without attack.
        robustness: attack -> robust accuracy under it alone.
        worst_case: over the attacks of the notebooks.
    """

    schema_version: int = 1
    classes: list[str] = []
    data: DataFacts | None = None
    note: str = ""
    environment: Environment | None = None
    test: Levels | None = None
    robustness: dict[str, RobustnessCurve] = {}
    worst_case: WorstCase | None = None
    examples: dict[str, ExamplesFacts] = {}
    training: TrainingFacts | None = None

    @field_validator("schema_version")
    @classmethod
    def _known_version(cls, value: int) -> int:
        if value < 1:
            raise ValueError(f"there is no version {value} of a record; make it again")
        if value > SCHEMA:
            raise ValueError(f"it was written by a later version of this project, and this one reads up to {SCHEMA}")
        return value

    @property
    def trained(self) -> TrainingFacts:
        """How it was trained.

        Raises:
            ValueError: the record does not tell.
        """
        if self.training is None:
            raise ValueError("the record does not tell how the model was trained; train it again")
        return self.training

    @property
    def accuracy(self) -> float:
        """Of all test images, without attack.

        Raises:
            ValueError: the model was not tested.
        """
        return self.tested.accuracy

    @property
    def tested(self) -> Scores:
        """Scores over all test images, without attack.

        Raises:
            ValueError: the model was not tested.
        """
        if self.test is None or self.test.image is None:
            raise ValueError("the record holds no test; run the model's notebook to the end")
        return self.test.image


class ModelRecord(Record):
    """One trained model.

    Attributes:
        step_size, grad_cam_attack, spot_check: what some figures and checks are made from.
        weights_sha256: of the weights file that belongs to it.
    """

    model: Architecture
    step_size: StepSizeFacts | None = None
    grad_cam_attack: tuple[dict[str, Any], float] | None = None
    spot_check: SpotCheck | None = None
    weights_sha256: str | None = None

    @field_validator("grad_cam_attack", mode="before")
    @classmethod
    def _as_pair(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class MemberTraining(Part):
    """Epochs of a member of a vote."""

    history: list[Epoch]
    best_epoch: int


class RuleScores(Part):
    """What one rule of a vote gives."""

    test: Levels
    robustness: dict[str, RobustnessCurve]
    worst_case: WorstCase | None = None


class VoteFacts(Part):
    """A vote.

    Attributes:
        rule: that counts as the ensemble.
        members: titles.
        weights: rule -> weight of each member.
        rules: what each rule gives.
        robustness: curves that are drawn beside the vote's own.
    """

    rule: str
    members: list[str]
    weights: dict[str, list[float]]
    rules: dict[str, RuleScores] = {}
    training: dict[str, MemberTraining] = {}
    robustness: dict[str, RobustnessCurve] = {}


class VoteRecord(Record):
    """A vote over trained models; ``baselines`` are of the same test images."""

    vote: VoteFacts
    baselines: dict[str, Metrics] | None = None
    transfer: TransferFacts | None = None


def parse_record(content: Any, where: str | Path) -> ModelRecord | VoteRecord:
    """What was read from a ``record.json``.

    Raises:
        ValueError: it describes no model and no vote; the message names the part that is missing or is none.
    """
    if not isinstance(content, dict) or not {"vote", "model"} & set(content):
        raise ValueError(f"{where} does not describe a model; it was not written by this project")
    kind: type[ModelRecord] | type[VoteRecord] = VoteRecord if "vote" in content else ModelRecord
    return parsed(kind, content, where, _TRAIN_AGAIN)


def read_record_file(path: Path) -> ModelRecord | VoteRecord:
    """A ``record.json``; see :func:`parse_record`."""
    return parse_record(read_json(path), path)
