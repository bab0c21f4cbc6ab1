"""One change for all images, fitted on images of other patients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from utils.attacks.attack import Attack, Kind, Terms, register
from utils.attacks.universal import universal_perturbation
from utils.core.checks import whole
from utils.data.sets import ImageSet

#: Images to fit on at most, spread over patients.
_IMAGES = 512


@register("universal")
class Universal(Kind):
    """The same shift added to every image (Moosavi-Dezfooli et al., 2017, arXiv:1610.08401); ``steps`` are epochs.

    It lies in the ball of each image, so that it is never stronger there than the best attack on that image.
    """

    title = "One change for all, {steps} epochs"
    fits = True

    def __call__(
        self, budget: Attack, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, terms: Terms
    ) -> torch.Tensor:
        return (images + terms.learnt.to(images)).clamp(0, 1)

    def fit(
        self, budget: Attack, model: nn.Module, images: ImageSet, terms: Terms, device: torch.device | str
    ) -> torch.Tensor:
        """The shift, 1 x 1 x H x W; see :func:`utils.attacks.universal.universal_perturbation`."""
        return universal_perturbation(
            model,
            images.balanced_subset(budget.options.get("images", _IMAGES)),
            eps=terms.eps,
            norm=terms.norm,
            epochs=budget.steps,
            seed=terms.seed,
            device=device,
        )

    def steps(self, budget: Attack) -> int:
        return 1

    def check_options(self, options: Mapping[str, Any]) -> None:
        if set(options) - {"images"}:
            raise ValueError("one change for all takes the option images, how many it is fitted on, and no other")
        whole("images", options.get("images", _IMAGES), 1)
