"""PGD that may change only a part of the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from utils.attacks.attack import Attack, Kind, Terms, register
from utils.attacks.gradient import pgd
from utils.data.anatomy import PARTS, part_masks


@register("region")
class RegionPGD(Kind):
    """PGD inside a part of the slice, after the idea of Kryptonite (arXiv:2108.10251), whose method is not public.

    What it finds lies in the ball of the whole image, so that it is never stronger than PGD there.
    """

    title = "PGD-{steps}"
    takes_loss = True

    def title_of(self, budget: Attack) -> str:
        return f"{super().title_of(budget)} in the {budget.options['part']}"

    def __call__(
        self, budget: Attack, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, terms: Terms
    ) -> torch.Tensor:
        return pgd(
            model,
            images,
            labels,
            alpha=budget.alpha,
            steps=budget.steps,
            random_start=budget.random_start,
            loss=budget.loss,
            mask=part_masks(images, budget.options["part"]).to(images.dtype),
            generator=terms.draws,
            eps=terms.eps,
            norm=terms.norm,
            assume_checked=terms.assume_checked,
        )

    def check_options(self, options: Mapping[str, Any]) -> None:
        if set(options) != {"part"} or options["part"] not in PARTS:
            raise ValueError(f"a region attack takes the option part, one of {', '.join(PARTS)}, and no other")
