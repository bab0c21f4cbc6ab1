"""The one training loop: any objective, CPU, one GPU or several, interrupted or not."""

from __future__ import annotations

import copy
import hashlib
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from models.def_models import MRIClassifier
from utils.core.processes import join_others, rank, shared_batchnorm, world_size
from utils.core.reproducibility import generator
from utils.data.sets import DataSplits
from utils.evaluation.probe import fit_head
from utils.training.checkpoints import hold, load_resume_state, rounded_to_half, save_resume_state
from utils.training.config import TrainConfig
from utils.training.objectives import Standard
from utils.training.record import ModelRecord
from utils.training.sampling import epoch_order, epoch_size
from utils.training.steps import Steps
from utils.training.validation import collapsed, validate


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
    collapsed_at: int = -1
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass
class TrainResult:
    """Outcome of :func:`train`; the model itself holds the best weights.

    Attributes:
        history: one dict an epoch with losses, accuracies, learning rate and seconds; ``collapsed`` is True in one
            that fell to catastrophic overfitting.
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

    Those that the training changed are rounded to half precision, in which a checkpoint stores them.

    The best epoch is the one with the highest balanced accuracy on the validation images, or with
    the highest robust balanced accuracy (PGD-10) where the objective attacks; ``config.keep`` may ask for the last
    epoch instead. The test side of
    ``splits`` is never looked at.

    Catastrophic overfitting (Wong et al., 2020, arXiv:2001.03994) is looked for after each epoch of
    hardening: a model that has learnt to fool the single step of its own training is robust to FGSM and not to PGD.
    Then the best weights so far are taken back, and the training goes on with the recipe's ``multi_step()``.

    Every draw depends only on the seed, the epoch and the step, so that a run which was killed
    and started again with the same arguments ends with the same weights. Several processes share each batch and
    end with the weights of one, up to rounding and to dropout, which each draws for itself.

    Args:
        model: trained in place; only parameters with ``requires_grad`` change.
        objective: recipe; None is :class:`utils.training.objectives.Standard`.
        config: settings; None takes the defaults.
        folder: where to keep the state of an unfinished run; None keeps none.
        save_every: seconds between saved states inside an epoch; each epoch's end is saved too.
        on_epoch: called with each history entry.

    Raises:
        ValueError: nothing is trainable, or ``folder`` holds an unfinished run of other settings.
        BlockingIOError: another process is training into ``folder``.
        FloatingPointError: the loss became NaN or infinite.
    """
    join_others()
    with hold(folder):
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
        from accelerate import Accelerator  # slow to import; only training needs it

        self.config = config
        self.folder = Path(folder) if folder else None
        self.save_every = save_every
        self.data = splits.train
        self.validation = splits.validation
        self.settings = {
            **config.as_dict(),
            "objective": objective.as_dict(),
            "fingerprint": splits.info.get("fingerprint"),
            "backbone": model.backbone_name,
            "image_size": model.image_size,
            "trainable": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
            "start": _digest(model),
        }
        saved = load_resume_state(self.folder, self.settings) if self.folder else None
        self.start = copied_weights(model)
        accelerator = Accelerator()
        if config.fit_head and not saved:
            fit_head(model.to(accelerator.device), splits.train, device=accelerator.device)
        self.steps = Steps(model, splits.train, objective, config, accelerator)
        self.state = TrainState()
        self.best = copied_weights(self.steps.plain)
        if saved:
            self._go_on_from(saved)

    @property
    def steps_an_epoch(self) -> int:
        whole, rest = divmod(epoch_size(self.data, self.config.slices_per_patient), self.config.batch_size)
        # BatchNorm cannot train on a single image, and no process on none: a last batch that is too small is left out
        return whole + (rest > 1 and rest >= world_size())

    @property
    def selected_by(self) -> str:
        return "validation_robust_accuracy" if self.steps.objective.attacks else "validation_balanced_accuracy"

    def finish(self, on_epoch: Callable[[dict[str, float]], None] | None) -> TrainResult:
        steps = self.config.num_epochs * self.steps_an_epoch
        done = self.state.epoch * self.steps_an_epoch + self.state.step
        bar = tqdm(total=steps, initial=done, desc=self.steps.objective.name, disable=rank() > 0)
        with bar, shared_batchnorm(self.steps.plain):
            while self.state.epoch < self.config.num_epochs and not self._out_of_patience():
                self._train_epoch(bar)
                entry = self._close_epoch()
                if on_epoch:
                    on_epoch(entry)
        # whatever is measured from now on is measured of the weights that a checkpoint holds in half the space
        changed = {name for name, value in self.best.items() if not torch.equal(value, self.start[name])}
        kept = {name: rounded_to_half(value) if name in changed else value for name, value in self.best.items()}
        self.steps.plain.load_state_dict(kept)
        self.steps.plain.eval()
        seconds = sum(entry["seconds"] for entry in self.state.history)
        return TrainResult(self.state.history, self.state.best_epoch, self.selected_by, seconds)

    def _out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.state.epoch - 1 - self.state.best_epoch

    def _train_epoch(self, bar: tqdm) -> None:
        self.steps.model.train()
        state, seed = self.state, self.config.seed
        order = epoch_order(
            self.data,
            self.config.sampling,
            generator(seed, state.epoch, "order"),
            slices_per_patient=self.config.slices_per_patient,
        )
        begun = saved = time.perf_counter()
        before = state.seconds
        while state.step < self.steps_an_epoch:
            start = state.step * self.config.batch_size
            progress = (state.epoch + state.step / self.steps_an_epoch) / self.config.num_epochs
            self.steps.take(order[start : start + self.config.batch_size], state.epoch, state.step, progress)
            state.step += 1
            state.seconds = before + time.perf_counter() - begun
            bar.update()
            last = state.step == self.steps_an_epoch
            due = time.perf_counter() - saved > self.save_every
            # several processes must read at the same steps; the end of an epoch is saved anyway
            if state.step % 10 == 0 or last or (due and world_size() == 1):
                self._read_counts()
                bar.set_postfix(self._numbers())
                if due and not last:
                    self._save()
                    saved = time.perf_counter()
            if (state.epoch, state.step) == (0, min(5, self.steps_an_epoch)):
                self._announce(bar)

    def _announce(self, bar: tqdm) -> None:
        minutes = self.state.seconds / self.state.step * bar.total / 60
        if rank() == 0:
            tqdm.write(f"{self.config.num_epochs} epochs of {self.steps_an_epoch} steps, about {minutes:.1f} minutes")

    def _numbers(self) -> dict[str, str]:
        state = self.state
        last = state.history[-1] if state.history else {}
        shown = {"epoch": f"{state.epoch + 1}/{self.config.num_epochs}", "loss": f"{state.loss_sum / state.seen:.3f}"}
        shown["accuracy"] = f"{state.correct / state.seen:.1%}"
        if last:
            shown["validation"] = f"{last[self.selected_by]:.1%}"
        return shown

    def _read_counts(self) -> None:
        loss, right, seen = self.steps.read()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training loss became {loss} in epoch {self.state.epoch + 1}; lower learning_rate"
            )
        self.state.loss_sum += loss
        self.state.correct += right
        self.state.seen += seen

    def _close_epoch(self) -> dict[str, float]:
        state, steps = self.state, self.steps
        entry = {
            "epoch": state.epoch,
            "train_loss": state.loss_sum / state.seen,
            "train_accuracy": state.correct / state.seen,
            "learning_rate": max(group["lr"] for group in steps.optimizer.param_groups),
            **validate(steps.judged, self.validation, steps.objective, self.config, steps.device),
            "seconds": state.seconds,
        }
        state.history.append(entry)
        n_attacked = min(len(self.validation), self.config.validation_images)
        if collapsed(entry, state.best_score, n_attacked):
            entry["collapsed"] = True
            self._fall_back()
        elif self.config.keep == "last" or entry[self.selected_by] > state.best_score:
            state.best_score, state.best_epoch = max(state.best_score, entry[self.selected_by]), state.epoch
            self.best = copied_weights(steps.judged)
        state.epoch, state.step, state.seconds = state.epoch + 1, 0, 0.0
        state.loss_sum, state.correct, state.seen = 0.0, 0, 0
        self._save()
        return entry

    def _fall_back(self) -> None:
        """Take the best weights back and attack harder from here on."""
        if self.state.collapsed_at < 0:
            self.state.collapsed_at = self.state.epoch
            self.steps.objective = self.steps.objective.multi_step()
        warnings.warn(
            f"catastrophic overfitting in epoch {self.state.epoch + 1}: the model is robust to FGSM and not to PGD. "
            f"Going on from the best weights with {self.steps.objective}.",
            stacklevel=2,
        )
        self.steps.go_on_from(self.best)

    def _save(self) -> None:
        if self.folder and rank() == 0:
            content = {
                "config": self.settings,
                "progress": dict(vars(self.state)),
                "model": self.steps.plain.state_dict(),
                "optimizer": self.steps.optimizer.state_dict(),
                "best": self.best,
                "average": self.steps.average.state_dict() if self.steps.average else {},
            }
            save_resume_state(content, self.folder)

    def _go_on_from(self, saved: dict[str, Any]) -> None:
        self.state = TrainState(**saved["progress"])
        self.steps.plain.load_state_dict(saved["model"])
        self.steps.optimizer.load_state_dict(saved["optimizer"])
        self.best = saved["best"]
        if self.steps.average:
            self.steps.average.load_state_dict(saved["average"])
        if self.state.collapsed_at >= 0:
            self.steps.objective = self.steps.objective.multi_step()


def _digest(model: nn.Module) -> str:
    """SHA-256 of all weights, by which a run knows its own start again."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def copied_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """On the CPU, and no longer the model's own."""
    return copy.deepcopy({name: value.cpu() for name, value in model.state_dict().items()})


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
    collapsed = ", collapsed" if entry.get("collapsed") else ""
    print(f"epoch {entry['epoch'] + 1}: {numbers}{collapsed} ({entry['seconds']:.0f} s)", flush=True)


def print_training(record: ModelRecord) -> None:
    """The epochs of a loaded model, as they were printed when it was trained.

    Raises:
        ValueError: the record does not tell them.
    """
    history = record.trained.history
    if record.environment:
        print(f"loaded; trained {record.environment.created[:10]} on {record.environment.hardware}")
    for entry in history:
        print_epoch(entry)
