"""The one training loop: any objective, CPU, one GPU or several, interrupted or not."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from models.def_models import MRIClassifier
from utils.attacks import pgd
from utils.checkpoints import load_resume_state, save_resume_state
from utils.config import TrainConfig
from utils.data import DataSplits, ImageSet
from utils.metrics import predict, scores
from utils.objectives import Standard, Step
from utils.reproducibility import derived_seed, generator

VALIDATION_STEPS = 10


@dataclass
class TrainState:
    """Everything that a run needs to go on after an interruption."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    seconds: float = 0.0
    best_score: float = -math.inf
    best_epoch: int = -1
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass
class TrainResult:
    """Outcome of :func:`train`; the model itself holds the best weights.

    Attributes:
        history: one dict an epoch with losses, accuracies, learning rate and seconds.
        best_epoch: 0-based epoch whose weights were kept.
        selected_by: the validation figure that chose it.
        seconds: wall time of all epochs.
    """

    history: list[dict[str, float]]
    best_epoch: int
    selected_by: str
    seconds: float


def train(
    model: MRIClassifier,
    splits: DataSplits,
    *,
    objective: Standard | None = None,
    config: TrainConfig | None = None,
    folder: str | Path | None = None,
    save_every: float = 300.0,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> TrainResult:
    """Train ``model`` in place and leave the weights of the best validation epoch in it.

    The best epoch is the one with the highest balanced accuracy on the validation images, or with
    the highest robust balanced accuracy (PGD-10) where the objective attacks. The test side of
    ``splits`` is never looked at.

    Every draw depends only on the seed, the epoch and the step, so that a run which was killed
    and started again with the same arguments ends with the same weights.

    Args:
        model: trained in place; only parameters with ``requires_grad`` change.
        objective: recipe; None is :class:`utils.objectives.Standard`.
        config: settings; None takes the defaults.
        folder: where to keep the state of an unfinished run; None keeps none.
        save_every: seconds between saved states inside an epoch; each epoch's end is saved too.
        on_epoch: called with each history entry.

    Raises:
        ValueError: nothing is trainable, or ``folder`` holds an unfinished run of other settings.
        FloatingPointError: the loss became NaN or infinite.
    """
    run = _Run(model, splits, objective or Standard(), config or TrainConfig(), folder, save_every)
    return run.finish(on_epoch)


class _Run:
    def __init__(
        self,
        model: MRIClassifier,
        splits: DataSplits,
        objective: Standard,
        config: TrainConfig,
        folder: str | Path | None,
        save_every: float,
    ) -> None:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("no parameter of the model is trainable; set requires_grad or freeze('head')")
        if len(splits.train) < 2 or not len(splits.validation):
            raise ValueError("training needs two training images and one validation image; prepare other ratios")
        self.accelerator = Accelerator(mixed_precision=_precision())
        self.config, self.objective = config, objective
        self.folder = Path(folder) if folder else None
        self.save_every = save_every
        self.data = splits.train
        self.validation = splits.validation
        self.images = splits.train.images.to(self.device)
        self.labels = splits.train.labels.to(self.device)
        optimizer = make_optimizer(model, config)
        self.plain = model.to(self.device)
        self.model, self.optimizer = self.accelerator.prepare(self.plain, optimizer)
        self.criterion = make_criterion(splits.train, config, self.device)
        self.settings = {
            **config.as_dict(),
            "objective": objective.as_dict(),
            "fingerprint": splits.info.get("fingerprint"),
            "backbone": model.backbone_name,
            "image_size": model.image_size,
            "trainable": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
            "start": _digest(model),
        }
        self.state = TrainState()
        self.best: dict[str, torch.Tensor] = {}
        self._restore()

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def steps_an_epoch(self) -> int:
        whole, rest = divmod(len(self.data), self.config.batch_size)
        # BatchNorm cannot train on a single image, so a last batch of one is left out
        return whole + (rest > 1)

    @property
    def selected_by(self) -> str:
        return "validation_robust_accuracy" if self.objective.attack_steps else "validation_balanced_accuracy"

    def finish(self, on_epoch: Callable[[dict[str, float]], None] | None) -> TrainResult:
        total = self.config.num_epochs * self.steps_an_epoch
        done = self.state.epoch * self.steps_an_epoch + self.state.step
        main = self.accelerator.is_main_process
        with tqdm(total=total, initial=done, desc=self.objective.name, disable=not main) as bar:
            while self.state.epoch < self.config.num_epochs and not self._out_of_patience():
                self._train_epoch(bar)
                entry = self._close_epoch()
                if on_epoch:
                    on_epoch(entry)
        self.plain.load_state_dict(self.best)
        self.plain.eval()
        seconds = sum(entry["seconds"] for entry in self.state.history)
        return TrainResult(self.state.history, self.state.best_epoch, self.selected_by, seconds)

    def _out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.state.epoch - 1 - self.state.best_epoch

    def _train_epoch(self, bar: tqdm) -> None:
        self.model.train()
        state, seed = self.state, self.config.seed
        order = torch.randperm(len(self.data), generator=generator(seed, state.epoch, "order"))
        begun = saved = time.perf_counter()
        before = state.seconds
        while state.step < self.steps_an_epoch:
            start = state.step * self.config.batch_size
            self._train_step(order[start : start + self.config.batch_size])
            state.step += 1
            state.seconds = before + time.perf_counter() - begun
            bar.update()
            if state.step % 10 == 0 or state.step == self.steps_an_epoch:
                bar.set_postfix(self._numbers())
            if (state.epoch, state.step) == (0, min(5, self.steps_an_epoch)):
                self._announce(bar)
            if time.perf_counter() - saved > self.save_every and state.step < self.steps_an_epoch:
                self._save()
                saved = time.perf_counter()

    def _announce(self, bar: tqdm) -> None:
        minutes = self.state.seconds / self.state.step * bar.total / 60
        if self.accelerator.is_main_process:
            tqdm.write(f"{self.config.num_epochs} epochs of {self.steps_an_epoch} steps, about {minutes:.1f} minutes")

    def _numbers(self) -> dict[str, str]:
        state = self.state
        last = state.history[-1] if state.history else {}
        shown = {"epoch": f"{state.epoch + 1}/{self.config.num_epochs}", "loss": f"{state.loss_sum / state.seen:.3f}"}
        shown["accuracy"] = f"{state.correct / state.seen:.1%}"
        if last:
            shown["validation"] = f"{last[self.selected_by]:.1%}"
        return shown

    def _train_step(self, index: torch.Tensor) -> None:
        config, state = self.config, self.state
        draws = generator(config.seed, state.epoch, state.step, "augment")
        torch.manual_seed(derived_seed(config.seed, state.epoch, state.step, "dropout"))
        images = self.images[index.to(self.device)].float() / 255
        labels = self.labels[index.to(self.device)]
        images = config.augmentation(images, draws)
        mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        images, labels = images[mine], labels[mine]
        progress = (state.epoch + state.step / self.steps_an_epoch) / config.num_epochs
        rate = config.learning_rate * rate_factor(config.scheduler, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        starts = generator(config.seed, state.epoch, state.step, "attack", self.accelerator.process_index)
        step = Step(self.criterion, progress, starts, self.plain)
        with self.accelerator.autocast():
            loss, logits = self.objective(self.model, images, labels, step)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.optimizer.step()
        self._count(loss.item(), logits, labels)

    def _count(self, loss: float, logits: torch.Tensor, labels: torch.Tensor) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training loss became {loss} in epoch {self.state.epoch + 1}; lower learning_rate"
            )
        self.state.loss_sum += loss * len(labels)
        self.state.correct += int((logits.argmax(1) == labels).sum())
        self.state.seen += len(labels)

    def _close_epoch(self) -> dict[str, float]:
        state = self.state
        entry = {
            "epoch": state.epoch,
            "train_loss": state.loss_sum / state.seen,
            "train_accuracy": state.correct / state.seen,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **self._validate(),
            "seconds": state.seconds,
        }
        state.history.append(entry)
        if entry[self.selected_by] > state.best_score:
            state.best_score, state.best_epoch = entry[self.selected_by], state.epoch
            self.best = copy.deepcopy({k: v.cpu() for k, v in self.plain.state_dict().items()})
        state.epoch, state.step, state.seconds = state.epoch + 1, 0, 0.0
        state.loss_sum, state.correct, state.seen = 0.0, 0, 0
        self._save()
        return entry

    def _validate(self) -> dict[str, float]:
        logits = predict(self.plain, self.validation, device=self.device)
        found = scores(logits.softmax(1), self.validation.labels, self.validation.classes)
        entry = {
            "validation_loss": F.cross_entropy(logits, self.validation.labels).item(),
            "validation_accuracy": found["accuracy"],
            "validation_balanced_accuracy": found["balanced_accuracy"],
        }
        if self.objective.attack_steps:
            entry["validation_robust_accuracy"] = self._validate_robustly()
        return entry

    def _validate_robustly(self) -> float:
        """Balanced accuracy under PGD-10 at the objective's eps on a fixed part of the validation set."""
        part = self.validation.balanced_subset(self.config.validation_images, seed=self.config.seed)
        draws = generator(self.config.seed, "validation")
        probabilities = []
        for images, labels in part.batches(self.config.batch_size, self.device):
            attacked = pgd(self.plain, images, labels, eps=self.objective.eps, steps=VALIDATION_STEPS, generator=draws)
            with torch.no_grad():
                probabilities.append(self._in_eval_mode(attacked).softmax(1).cpu())
        return scores(torch.cat(probabilities), part.labels, part.classes)["balanced_accuracy"]

    def _in_eval_mode(self, images: torch.Tensor) -> torch.Tensor:
        self.plain.eval()
        return self.plain(images).float()

    def _save(self) -> None:
        if self.folder and self.accelerator.is_main_process:
            content = {
                "config": self.settings,
                "progress": dict(vars(self.state)),
                "model": self.plain.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "best": self.best,
            }
            save_resume_state(content, self.folder)

    def _restore(self) -> None:
        saved = load_resume_state(self.folder, self.settings) if self.folder else None
        if saved:
            self.state = TrainState(**saved["progress"])
            self.plain.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.best = saved["best"]


def _digest(model: nn.Module) -> str:
    """SHA-256 of all weights, by which a run knows its own start again."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def _precision() -> str:
    """bfloat16 where the GPU has it. Not float16: an attack's input gradient would underflow in it."""
    fits = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fits else "no"


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Optimiser over the trainable parameters; biases and norms are not decayed."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9, nesterov=True)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.learning_rate, fused=True)


def make_criterion(train_set: ImageSet, config: TrainConfig, device: torch.device) -> Callable:
    """Cross-entropy with smoothed labels and class weights of mean 1 over the training images."""
    counts = train_set.labels.bincount(minlength=len(train_set.classes)).double()
    weights = counts.clamp(min=1) ** -config.class_balance
    weights = (weights * counts.sum() / (weights * counts).sum()).float().to(device)

    def criterion(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = F.cross_entropy(
            logits.float(), labels, weight=weights, label_smoothing=config.label_smoothing, reduction="none"
        )
        # a mean over the batch, not over its weights: a batch's makeup must not change its step size
        return losses.mean()

    return criterion


def rate_factor(scheduler: str, progress: float) -> float:
    """Learning rate relative to its peak after a share ``progress`` of the training, 0..1."""
    if scheduler == "constant":
        return 1.0
    if scheduler == "step":
        return 0.1 ** (int(progress * 10) // 4)
    if scheduler == "onecycle" and progress < 0.2:
        return 0.04 + 0.96 * progress / 0.2
    rest = (progress - 0.2) / 0.8 if scheduler == "onecycle" else progress
    return 0.5 * (1 + math.cos(math.pi * rest))


def print_epoch(entry: dict[str, float]) -> None:
    """One line an epoch, for ``on_epoch`` of :func:`train`."""
    shown = [
        ("loss", "train_loss", ".3f"),
        ("accuracy", "train_accuracy", ".1%"),
        ("validation loss", "validation_loss", ".3f"),
        ("balanced accuracy", "validation_balanced_accuracy", ".1%"),
        ("robust", "validation_robust_accuracy", ".1%"),
    ]
    numbers = ", ".join(f"{name} {entry[key]:{form}}" for name, key, form in shown if key in entry)
    print(f"epoch {entry['epoch'] + 1}: {numbers} ({entry['seconds']:.0f} s)", flush=True)
