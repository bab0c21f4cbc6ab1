"""What a training run is told, as plain values that go into its record."""

from __future__ import annotations

import ast
from dataclasses import asdict, dataclass, field
from typing import Any

from utils.core.checks import LARGEST_SEED, choice, number, whole
from utils.core.precision import PRECISIONS
from utils.training.augment import Augmentation

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULERS = ("cosine", "onecycle", "step", "constant")
SAMPLINGS = ("shuffled", "class", "patient")
KEEPS = ("best", "last")


#: What a value on the command line may be made of.
_CONSTANT_NODES = (
    ast.Expression,
    ast.Constant,
    ast.List,
    ast.Tuple,
    ast.Load,
    ast.BinOp,
    ast.Div,
    ast.UnaryOp,
    ast.USub,
)


#: Random slices of each patient an epoch, in the notebooks and commands unless they are told otherwise.
SLICES_PER_PATIENT = 8


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run.

    Attributes:
        num_epochs: passes over the training set.
        batch_size: images a step over all processes.
        accumulation_steps: parts of a batch that are computed one after the other and make one step together, with so
            much less memory; BatchNorm normalises each part by itself.
        learning_rate: peak learning rate.
        weight_decay: decoupled for ``adamw``, L2 otherwise; not applied to biases and norms.
        optimizer, scheduler: one of ``OPTIMIZERS``, ``SCHEDULERS``.
        label_smoothing: 0..1.
        class_balance: exponent p of class weights proportional to count**-p; 0 none, 1 full.
        sampling: which images make up a batch, see :func:`utils.training.sampling.epoch_order`.
        slices_per_patient: an epoch is made of so many slices of each training patient, drawn anew each epoch; 0
            takes all. Slices of one patient repeat each other, so that fewer of them an epoch cost little.
        mixup, cutmix: see :func:`utils.training.sampling.mix`, in [0, 1]; 0 mixes nothing.
        layer_decay: factor on the learning rate from each block to the one before it, in (0, 1].
        ema_decay: of the moving average of the weights that is validated and kept, in [0, 1); 0 keeps the weights
            themselves.
        awp: size of the adversarial weight perturbation relative to each weight matrix, 0 for none; see
            :func:`utils.training.optimization.perturbed_weights`.
        clip_norm: largest gradient norm.
        patience: epochs without a better validation score before stopping; 0 never stops.
        validation_images: at most so many validation images are attacked an epoch when hardening.
        keep: ``best`` keeps the epoch with the best validation score, ``last`` the last one, for where few validation
            patients make that score a matter of chance.
        fit_head: before the first step the last layer is fitted to what the model sees of the training images, see
            :func:`utils.evaluation.probe.fit_head`; for published weights, whose head is new.
        precision: see :mod:`utils.core.precision`; validation always judges in float32.
        seed: of initial weights, order, augmentation and random starts.
        augmentation: see :class:`utils.training.augment.Augmentation`.
    """

    num_epochs: int = 20
    batch_size: int = 64
    accumulation_steps: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    optimizer: str = "adamw"
    scheduler: str = "onecycle"
    label_smoothing: float = 0.0
    class_balance: float = 0.5
    sampling: str = "shuffled"
    slices_per_patient: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    layer_decay: float = 1.0
    ema_decay: float = 0.0
    awp: float = 0.0
    clip_norm: float = 5.0
    patience: int = 0
    validation_images: int = 512
    keep: str = "best"
    fit_head: bool = False
    precision: str = "auto"
    seed: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        for name, least in (
            ("num_epochs", 1),
            ("batch_size", 2),
            ("accumulation_steps", 1),
            ("validation_images", 1),
            ("patience", 0),
            ("slices_per_patient", 0),
        ):
            whole(name, getattr(self, name), least)
        whole("seed", self.seed, 0, LARGEST_SEED)
        number("learning_rate", self.learning_rate, above=0, most=10)
        number("clip_norm", self.clip_norm, above=0)
        for name in ("weight_decay", "awp"):
            number(name, getattr(self, name), least=0)
        for name in ("mixup", "cutmix", "class_balance"):
            number(name, getattr(self, name), least=0, most=1)
        for name in ("ema_decay", "label_smoothing"):
            number(name, getattr(self, name), least=0, below=1)
        number("layer_decay", self.layer_decay, above=0, most=1)
        if not isinstance(self.augmentation, Augmentation):
            raise ValueError(f"augmentation must be an Augmentation, not {self.augmentation!r}")
        if not isinstance(self.fit_head, bool):
            raise ValueError(f"fit_head must be True or False, not {self.fit_head!r}")
        for name, known in (
            ("optimizer", OPTIMIZERS),
            ("scheduler", SCHEDULERS),
            ("sampling", SAMPLINGS),
            ("precision", PRECISIONS),
            ("keep", KEEPS),
        ):
            choice(name, getattr(self, name), known)

    def as_dict(self) -> dict[str, Any]:
        """Plain nested values."""
        return asdict(self)


def parse_trainable(text: str) -> str | int:
    """A number of blocks, or a word for :meth:`models.def_models.MRIClassifier.freeze`."""
    return int(text) if text.isdigit() else text


def parse_assignment(text: str) -> tuple[str, Any]:
    """Name and value of ``name=value``; the value is a literal, a fraction such as ``2/255``, or else a string.

    Raises:
        ValueError: no ``=``, no name before it, or a division by zero behind it.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--set needs name=value, not {text!r}")
    try:
        tree = ast.parse(value, mode="eval")
        if any(not isinstance(node, _CONSTANT_NODES) for node in ast.walk(tree)):
            return name, value
        return name, eval(compile(tree, "--set", "eval"), {"__builtins__": {}})  # constants and / only
    except ZeroDivisionError as error:
        raise ValueError(f"{name}={value} divides by zero") from error
    except (ValueError, SyntaxError, TypeError):
        return name, value
