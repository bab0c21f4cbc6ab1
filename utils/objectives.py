"""What one training step minimises: one small object a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from utils.attacks import check_eps, default_alpha, pgd

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Step:
    """What an objective may know of the training step that it is called in.

    Attributes:
        criterion: mean loss of logits N x K and labels N.
        progress: share of the training that is done, 0..1.
        generator: source of random starts.
        attacked: the model without any wrapper for several processes.
    """

    criterion: Criterion
    progress: float
    generator: torch.Generator
    attacked: nn.Module


@dataclass(frozen=True)
class Standard:
    """Cross-entropy on clean images."""

    name: ClassVar[str] = "standard"
    attack_steps: ClassVar[int] = 0

    def __call__(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and the logits that it was made of.

        Args:
            model: in train mode, possibly wrapped for several processes.
            images: float tensor N x C x H x W in [0, 1].
            labels: int64 tensor N.
        """
        logits = model(images)
        return step.criterion(logits, labels), logits

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class Adversarial(Standard):
    """Weighted adversarial training: (1 - w) * CE(clean) + w * CE(PGD) (Madry et al., 2018).

    Attributes:
        eps: radius in [0, 1] at the end of the ramp.
        alpha: PGD step size; None takes 2.5 * eps / steps.
        steps: PGD steps a training step.
        adv_weight: w, in (0, 1]; with 1 the clean half is skipped.
        ramp: share of the training over which eps grows linearly from 0; hardening a clean
            model at full strength from the first step can fail outright.
    """

    eps: float
    alpha: float | None = None
    steps: int = 3
    adv_weight: float = 0.5
    ramp: float = 0.3
    name: ClassVar[str] = "adversarial"

    def __post_init__(self) -> None:
        check_eps(self.eps)
        if self.alpha is not None and not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1] pixel units, or None, not {self.alpha}")
        if not 0 < self.adv_weight <= 1:
            raise ValueError(f"adv_weight must be in (0, 1], not {self.adv_weight}")
        if self.steps < 1 or not 0 <= self.ramp <= 1:
            raise ValueError(f"steps must be at least 1 and ramp in [0, 1], not {self.steps}, {self.ramp}")

    @property
    def attack_steps(self) -> int:  # noqa: D102
        return self.steps

    def __call__(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Standard.__call__`; the logits are those of the adversarial images."""
        share = min(1.0, step.progress / self.ramp) if self.ramp else 1.0
        full_alpha = default_alpha(self.eps, self.steps) if self.alpha is None else self.alpha
        adversarial = pgd(
            step.attacked,
            images,
            labels,
            eps=self.eps * share,
            alpha=full_alpha * share,
            steps=self.steps,
            generator=step.generator,
        )
        if self.adv_weight == 1:
            logits = model(adversarial)
            return step.criterion(logits, labels), logits
        # one pass over both halves gives them the same BatchNorm statistics
        clean_logits, adversarial_logits = model(torch.cat([images, adversarial])).chunk(2)
        clean, attacked_loss = step.criterion(clean_logits, labels), step.criterion(adversarial_logits, labels)
        return (1 - self.adv_weight) * clean + self.adv_weight * attacked_loss, adversarial_logits
