"""How much an experiment spends on each of its models, and how that is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import BeforeValidator

from models.def_models import BACKBONES
from utils.attacks.suites import check_suite

SUITE = "brief"
#: Files of encoders, and what they are called wherever their results are shown.
ENCODERS = {
    "dinov2_vits14_dav2s_fp16.safetensors": "DINOv2-S (Depth-Anything-V2)",
    "efficientnet_b0_lite0_fp16.safetensors": "ImageNet (Lite0 convolutions)",
}


@dataclass(frozen=True)
class Budget:
    """How much is spent on each run; the same for all variants.

    Attributes:
        image_size: side in pixels of what the backbone sees.
        clean_epochs: epochs without attack.
        epochs: epochs of hardening.
        train_steps: PGD steps a step of hardening.
        eps: radius of hardening.
        batch_size: images a step.
        clean_rate: learning rate without attack.
        rate: learning rate of hardening.
        validation_images: at most so many are attacked after each epoch.
        max_images: at most so many test and so many validation images are attacked in the end, spread over patients.
        weights: of the clean model: scratch, pretrained, or the path of a weights file.
        trainable: what is trained, in the clean model and in hardening: all, head, or the head and the last N blocks.
        slices_per_patient: so many random slices of each patient an epoch; 0 takes all.
        label_smoothing: of both trainings, 0..1.
        fit_head: before the clean model's first step its last layer is fitted to what it sees of the training images;
            for published weights, whose head is new.
        keep: which epoch of both trainings: the best on the validation patients, or the last.
        suite: which attacks score the models in the end: smoke, quick, brief, targeted, standard or full.
        precision: of both trainings: auto, fp32 or bf16; attacks that score a model compute in float32.
    """

    image_size: int = 32
    clean_epochs: int = 14
    epochs: int = 8
    train_steps: int = 2
    eps: float = 2 / 255
    batch_size: int = 64
    clean_rate: float = 1e-3
    rate: float = 5e-4
    validation_images: int = 512
    max_images: int = 640
    weights: str = "scratch"
    trainable: str | int = "all"
    slices_per_patient: int = 0
    label_smoothing: float = 0.0
    keep: str = "best"
    fit_head: bool = False
    suite: str = SUITE
    precision: str = "auto"

    def __post_init__(self) -> None:
        check_suite(self.suite)


def weights_name(weights: str) -> str:
    """Weights without the place where they lie."""
    return Path(weights).name


def _budget(content: Any) -> Any:
    """What a file holds, as a budget; what a later version has added to it is passed over."""
    if not isinstance(content, dict):
        return content
    return Budget(**{name: value for name, value in content.items() if name in Budget.__dataclass_fields__})


#: A budget inside of a record.
BudgetPart = Annotated[Budget, BeforeValidator(_budget)]


class _Started(Protocol):
    @property
    def model(self) -> Mapping[str, Any]: ...

    @property
    def budget(self) -> Budget: ...


def describe_start(summary: _Started) -> str:
    """Backbone, size and, where they were not drawn at random, the weights that the training began with."""
    model, weights = summary.model, summary.budget.weights
    backbones = " + ".join(BACKBONES[name].title for name in model["backbone"].split("+"))
    title = f"{backbones}, {model['image_size']} px"
    return title + ("" if weights in ("scratch", "folds") else f", from {ENCODERS.get(weights, weights)}")
