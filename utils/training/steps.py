"""One step of training: augment, attack, add up gradients, move the weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from models.def_models import MRIClassifier
from utils.core.precision import autocast
from utils.core.processes import rank, total, world_size
from utils.core.reproducibility import derived_seed, generator
from utils.data.sets import ImageSet
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
from utils.training.sampling import mix

if TYPE_CHECKING:
    from accelerate import Accelerator


class Steps:
    """Model, optimizer and images of a training, ready to take steps.

    Attributes:
        plain: the model itself; ``model`` is what its processes share.
        average: moving average of its weights, or None.
        objective: recipe; may be replaced between two steps.
    """

    def __init__(
        self,
        model: MRIClassifier,
        data: ImageSet,
        objective: Standard,
        config: TrainConfig,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.objective, self.accelerator = config, objective, accelerator
        self.device = accelerator.device
        self.images, self.labels = data.images.to(self.device), data.labels.to(self.device)
        self.n_classes = len(data.classes)
        optimizer = make_optimizer(model, config)
        self.average = make_average(model.to(self.device), config.ema_decay) if config.ema_decay else None
        self.plain = model.to(self.device)
        self.model, self.optimizer = accelerator.prepare(self.plain, optimizer)
        self.criterion = make_criterion(data, config, self.device)
        #: Sums of loss, right answers and images since the last reading.
        self.unread = torch.zeros(3, device=self.device)

    @property
    def judged(self) -> MRIClassifier:
        """What is validated and kept: the averaged weights where there is an average."""
        return cast(MRIClassifier, self.average.module) if self.average else self.plain

    def go_on_from(self, weights: dict[str, torch.Tensor]) -> None:
        """Take these weights, and forget what the optimizer remembers of others."""
        self.plain.load_state_dict(weights)
        self.optimizer.state.clear()
        if self.average:
            self.average.module.load_state_dict(weights)

    def take(self, index: torch.Tensor, epoch: int, step: int, progress: float) -> None:
        """Train on the images of one batch over all processes.

        Args:
            index: which images.
            epoch, step: of which everything that is drawn depends, beside the seed.
            progress: share of the whole training that is done, in [0, 1).
        """
        config = self.config
        draws = generator(config.seed, epoch, step, "augment")
        torch.manual_seed(derived_seed(config.seed, epoch, step, "dropout", rank()))
        images = self.images[index.to(self.device)].float() / 255
        labels = self.labels[index.to(self.device)]
        images = config.augmentation(images, draws)
        targets = None
        if config.mixup or config.cutmix:
            draws = generator(config.seed, epoch, step, "mix")
            images, labels, targets = mix(
                images, labels, self.n_classes, mixup=config.mixup, cutmix=config.cutmix, generator=draws
            )
        set_rate(self.optimizer, config.learning_rate * rate_factor(config.scheduler, progress))
        # drawn for each place in the batch, whichever process attacks it
        starts = [generator(config.seed, epoch, step, "attack", place) for place in range(len(index))]
        parts = self._parts(len(index))
        with autocast(config.precision, self.device):
            # all parts are attacked before any weight is moved
            losses = [
                self._loss_of(
                    images[part], labels[part], None if targets is None else targets[part], starts[part], progress
                )
                for part in parts
            ]
            self._backward(losses, [labels[part] for part in parts], len(index))
        self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_norm)
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

    def read(self) -> tuple[float, int, int]:
        """Sums of loss, right answers and images over all processes since the last reading."""
        loss, right, seen = total(self.unread).tolist()
        self.unread = torch.zeros_like(self.unread)
        return loss, int(right), int(seen)
