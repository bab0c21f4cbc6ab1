"""Random signs at the edge of the ball: no attack, but what one must beat."""

from __future__ import annotations

import torch
from torch import nn

from utils.attacks.attack import Attack, Kind, Terms, register
from utils.attacks.balls import random_point, steepest
from utils.attacks.given import check_batch


@register("noise")
class Noise(Kind):
    """Random signs at the edge of the ball: no attack, but what one must beat."""

    title = "Noise"
    options = ()
    sees = "nothing"
    times = " x"

    def __call__(
        self, budget: Attack, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, terms: Terms
    ) -> torch.Tensor:
        check_batch(model, images, labels)
        away = random_point(images, 1.0, terms.norm, terms.draws) - images
        return (images + terms.eps * steepest(away, terms.norm)).clamp(0, 1)

    def steps(self, budget: Attack) -> int:
        return 1
