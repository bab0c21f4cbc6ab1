"""The one training loop: any objective, CPU, one GPU or several, interrupted or not."""

from __future__ import annotations

import copy
import hashlib
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from models.def_models import MRIClassifier
from utils.attacks.attack import Attack
from utils.core.paths import need
from utils.core.precision import autocast
from utils.core.processes import join_others, rank, share_out, shared_batchnorm, total, world_size
from utils.core.reproducibility import derived_seed, generator
from utils.data.sets import DataSplits, ImageSet
from utils.evaluation.metrics import predict, scores
from utils.training.checkpoints import hold, load_resume_state, rounded_to_half, save_resume_state
from utils.training.config import TrainConfig
from utils.training.objectives import Outcome, Standard, Step
from utils.training.optimization import (
    make_average,
    make_criterion,
    make_optimizer,
    perturbed_weights,
    rate_factor,
    set_rate,
)
from utils.training.sampling import epoch_order, epoch_size, mix

VALIDATION_STEPS = 10
#: Catastrophic overfitting: accuracy under PGD falls this far below its best, and this far below that under FGSM.
COLLAPSE = 0.15
#: On n images it must fall by at least this over the root of n, about two standard errors of a difference.
COLLAPSE_NOISE = 1.5


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
    the highest robust balanced accuracy (PGD-10) where the objective attacks. The test side of
    ``splits`` is never looked at.

    Catastrophic overfitting (Wong et al., 2020, arXiv:2001.03994) is looked for after each epoch of
    hardening: a model that has learnt to fool the single step of its own training stands FGSM and falls to PGD.
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

        self.accelerator = Accelerator()
        self.config, self.objective = config, objective
        self.folder = Path(folder) if folder else None
        self.save_every = save_every
        self.data = splits.train
        self.validation = splits.validation
        self.images = splits.train.images.to(self.device)
        self.labels = splits.train.labels.to(self.device)
        optimizer = make_optimizer(model, config)
        self.average = make_average(model.to(self.device), config.ema_decay) if config.ema_decay else None
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
        #: Sums of loss, right answers and images since the last reading.
        self.unread = torch.zeros(3, device=self.device)
        self.start = self.best = _copy(self.plain)
        self._restore()

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def judged(self) -> MRIClassifier:
        """What is validated and kept: the averaged weights where there is an average."""
        return self.average.module if self.average else self.plain

    @property
    def steps_an_epoch(self) -> int:
        whole, rest = divmod(epoch_size(self.data, self.config.slices_per_patient), self.config.batch_size)
        # BatchNorm cannot train on a single image, and no process on none: a last batch that is too small is left out
        return whole + (rest > 1 and rest >= world_size())

    @property
    def selected_by(self) -> str:
        return "validation_robust_accuracy" if self.objective.attack_steps else "validation_balanced_accuracy"

    def finish(self, on_epoch: Callable[[dict[str, float]], None] | None) -> TrainResult:
        steps = self.config.num_epochs * self.steps_an_epoch
        done = self.state.epoch * self.steps_an_epoch + self.state.step
        options = {"total": steps, "initial": done, "desc": self.objective.name, "disable": rank() > 0}
        with tqdm(**options) as bar, shared_batchnorm(self.plain):
            while self.state.epoch < self.config.num_epochs and not self._out_of_patience():
                self._train_epoch(bar)
                entry = self._close_epoch()
                if on_epoch:
                    on_epoch(entry)
        # whatever is measured from now on is measured of the weights that a checkpoint holds in half the space
        changed = {name for name, value in self.best.items() if not torch.equal(value, self.start[name])}
        kept = {name: rounded_to_half(value) if name in changed else value for name, value in self.best.items()}
        self.plain.load_state_dict(kept)
        self.plain.eval()
        seconds = sum(entry["seconds"] for entry in self.state.history)
        return TrainResult(self.state.history, self.state.best_epoch, self.selected_by, seconds)

    def _out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.state.epoch - 1 - self.state.best_epoch

    def _train_epoch(self, bar: tqdm) -> None:
        self.model.train()
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
            self._train_step(order[start : start + self.config.batch_size])
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

    def _train_step(self, index: torch.Tensor) -> None:
        config, state = self.config, self.state
        draws = generator(config.seed, state.epoch, state.step, "augment")
        torch.manual_seed(derived_seed(config.seed, state.epoch, state.step, "dropout", rank()))
        images = self.images[index.to(self.device)].float() / 255
        labels = self.labels[index.to(self.device)]
        images = config.augmentation(images, draws)
        targets = None
        if config.mixup or config.cutmix:
            shares = {"mixup": config.mixup, "cutmix": config.cutmix}
            draws = generator(config.seed, state.epoch, state.step, "mix")
            images, labels, targets = mix(images, labels, len(self.data.classes), **shares, generator=draws)
        progress = (state.epoch + state.step / self.steps_an_epoch) / config.num_epochs
        set_rate(self.optimizer, config.learning_rate * rate_factor(config.scheduler, progress))
        # drawn for each place in the batch, whichever process attacks it
        draws = [generator(config.seed, state.epoch, state.step, "attack", place) for place in range(len(index))]
        parts = self._parts(len(index))
        with autocast(config.precision, self.device):
            # all parts are attacked before any weight is moved
            losses = [
                self._loss_of(
                    images[part], labels[part], None if targets is None else targets[part], draws[part], progress
                )
                for part in parts
            ]
            self._backward(losses, [labels[part] for part in parts], len(index))
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.plain)

    def _parts(self, batch: int) -> list[slice]:
        """This process's places in a batch of ``batch`` images, in parts that are computed one after the other."""
        mine = range(batch)[rank() :: world_size()]
        # as many in each process, and none with a single image, on which BatchNorm cannot train
        count = max(1, min(self.config.accumulation_steps, batch // world_size() // 2))
        edges = [len(mine) * part // count for part in range(count + 1)]
        parts = [mine[first:end] for first, end in pairwise(edges)]
        return [slice(part.start, part.stop, part.step) for part in parts]

    def _loss_of(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        targets: torch.Tensor | None,
        draws: list[torch.Generator],
        progress: float,
    ) -> Callable[[nn.Module], Outcome]:
        """Attack these images; what comes back gives a model's mean loss on them, and its logits."""
        # attacks want one label an image; the loss of mixed images takes the shares of both
        criterion = self.criterion if targets is None else lambda logits, _: self.criterion(logits, targets)
        step = Step(criterion, progress, draws, self.plain)
        attacked = self.objective.attack(images, labels, step)
        return partial(self.objective.loss, images=images, attacked=attacked, labels=labels, step=step)

    def _backward(self, losses: list[Callable[[nn.Module], Outcome]], labels: list[torch.Tensor], batch: int) -> None:
        """Add up the gradients of this process's parts of a batch of ``batch`` images."""
        # gradients are averaged over processes: a larger part must count more
        shares = [len(own) * world_size() / batch for own in labels]
        moved = (share * loss_of(self.plain)[0] for share, loss_of in zip(shares, losses))
        with perturbed_weights(self.plain, moved, self.config.awp):
            self.optimizer.zero_grad()
            for share, loss_of, own in zip(shares, losses, labels):
                loss, logits = loss_of(self.model)
                self.accelerator.backward(share * loss)
                self._count(loss.detach(), logits.detach(), own)

    def _count(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add to what was not read yet: reading a number from a GPU at each step would make it wait."""
        right = (logits.argmax(1) == labels).sum()
        self.unread += torch.stack([loss.float() * len(labels), right.float(), torch.full_like(loss, len(labels))])

    def _read_counts(self) -> None:
        loss, right, seen = total(self.unread).tolist()
        self.unread = torch.zeros_like(self.unread)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training loss became {loss} in epoch {self.state.epoch + 1}; lower learning_rate"
            )
        self.state.loss_sum += loss
        self.state.correct += int(right)
        self.state.seen += int(seen)

    def _close_epoch(self) -> dict[str, float]:
        state = self.state
        entry = {
            "epoch": state.epoch,
            "train_loss": state.loss_sum / state.seen,
            "train_accuracy": state.correct / state.seen,
            "learning_rate": max(group["lr"] for group in self.optimizer.param_groups),
            **self._validate(),
            "seconds": state.seconds,
        }
        state.history.append(entry)
        if self._collapsed(entry):
            entry["collapsed"] = True
            self._fall_back()
        elif entry[self.selected_by] > state.best_score:
            state.best_score, state.best_epoch = entry[self.selected_by], state.epoch
            self.best = _copy(self.judged)
        state.epoch, state.step, state.seconds = state.epoch + 1, 0, 0.0
        state.loss_sum, state.correct, state.seen = 0.0, 0, 0
        self._save()
        return entry

    def _collapsed(self, entry: dict[str, float]) -> bool:
        if not self.objective.attack_steps:
            return False
        n_images = min(len(self.validation), self.config.validation_images)
        fallen = min(self.state.best_score, entry["validation_fgsm_accuracy"]) - entry["validation_robust_accuracy"]
        return fallen > max(COLLAPSE, COLLAPSE_NOISE / math.sqrt(n_images))

    def _fall_back(self) -> None:
        """Take the best weights back and attack harder from here on."""
        if self.state.collapsed_at < 0:
            self.state.collapsed_at = self.state.epoch
            self.objective = self.objective.multi_step()
        warnings.warn(
            f"catastrophic overfitting in epoch {self.state.epoch + 1}: the model stands FGSM and falls to PGD. "
            f"Going on from the best weights with {self.objective}.",
            stacklevel=2,
        )
        self.plain.load_state_dict(self.best)
        self.optimizer.state.clear()
        if self.average:
            self.average.module.load_state_dict(self.best)

    def _validate(self) -> dict[str, float]:
        logits = predict(self.judged, self.validation, device=self.device)
        found = scores(logits.softmax(1), self.validation.labels, self.validation.classes)
        entry = {
            "validation_loss": F.cross_entropy(logits, self.validation.labels).item(),
            "validation_accuracy": found["accuracy"],
            "validation_balanced_accuracy": found["balanced_accuracy"],
        }
        if self.objective.attack_steps:
            entry |= self._validate_robustly()
        return entry

    def _validate_robustly(self) -> dict[str, float]:
        """Balanced accuracy under PGD-10 and FGSM at the objective's eps on a fixed part of the validation set."""
        part = self.validation.balanced_subset(self.config.validation_images, seed=self.config.seed)
        attacks = {
            "validation_robust_accuracy": Attack("pgd", steps=VALIDATION_STEPS),
            "validation_fgsm_accuracy": Attack("fgsm"),
        }
        return {name: self._accuracy_under(attack, part) for name, attack in attacks.items()}

    def _accuracy_under(self, attack: Attack, part: ImageSet) -> float:
        model = self.judged.eval()

        def answer(place: torch.Tensor) -> torch.Tensor:
            images, labels = part.pixels(place, self.device), part.labels[place].to(self.device)
            draws = [generator(self.config.seed, "validation", image) for image in place.tolist()]
            with autocast(self.config.precision, self.device):
                attacked = attack(model, images, labels, eps=self.objective.eps, draws=draws, assume_checked=True)
            with torch.no_grad():
                return model(attacked).float().softmax(1).cpu()

        probabilities = share_out(torch.arange(len(part)).split(self.config.batch_size), answer)
        return scores(torch.cat(probabilities), part.labels, part.classes)["balanced_accuracy"]

    def _save(self) -> None:
        if self.folder and rank() == 0:
            content = {
                "config": self.settings,
                "progress": dict(vars(self.state)),
                "model": self.plain.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "best": self.best,
                "average": self.average.state_dict() if self.average else {},
            }
            save_resume_state(content, self.folder)

    def _restore(self) -> None:
        saved = load_resume_state(self.folder, self.settings) if self.folder else None
        if saved:
            self.state = TrainState(**saved["progress"])
            self.plain.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.best = saved["best"]
            if self.average:
                self.average.load_state_dict(saved["average"])
            if self.state.collapsed_at >= 0:
                self.objective = self.objective.multi_step()


def _copy(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy({name: value.cpu() for name, value in model.state_dict().items()})


def _digest(model: nn.Module) -> str:
    """SHA-256 of all weights, by which a run knows its own start again."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


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


def print_training(record: Mapping[str, Any]) -> None:
    """The epochs of a loaded model, as they were printed when it was trained.

    Raises:
        ValueError: the record does not tell them.
    """
    told = ("environment.created", "environment.hardware", "training.history")
    need(dict(record), told, "the model's record", "train the model again")
    environment = record["environment"]
    print(f"loaded; trained {environment['created'][:10]} on {environment['hardware']}")
    for entry in record["training"]["history"]:
        print_epoch(entry)
