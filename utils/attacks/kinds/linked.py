"""PGD on all slices of a patient together, tied to each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from utils.attacks.attack import Attack, Kind, Terms, register
from utils.attacks.linked import LINKS, linked_pgd


@register("linked")
class LinkedPGD(Kind):
    """PGD on a patient's slices, which are channels here: each free, smooth from slice to slice, or one for all."""

    title = "PGD-{steps}"
    norms = ("linf",)
    takes_loss = True

    def title_of(self, budget: Attack) -> str:
        return f"{super().title_of(budget)}, {LINKS[budget.options['link']]}"

    def __call__(
        self, budget: Attack, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, terms: Terms
    ) -> torch.Tensor:
        return linked_pgd(
            model,
            images,
            labels,
            link=budget.options["link"],
            steps=budget.steps,
            alpha=budget.alpha,
            loss=budget.loss,
            generator=terms.draws,
            eps=terms.eps,
            assume_checked=terms.assume_checked,
        )

    def check_options(self, options: Mapping[str, Any]) -> None:
        if set(options) != {"link"} or options["link"] not in LINKS:
            raise ValueError(f"an attack on a patient takes the option link, one of {', '.join(LINKS)}, and no other")
