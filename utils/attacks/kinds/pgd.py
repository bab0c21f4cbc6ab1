"""Projected steps from random starts."""

from __future__ import annotations

import torch
from torch import nn

from utils.attacks.attack import Attack, Kind, Terms, register
from utils.attacks.gradient import pgd


@register("pgd")
class PGD(Kind):
    """Projected steps from random starts (Madry et al., 2018, arXiv:1706.06083)."""

    title = "PGD-{steps}"
    options = ()
    takes_loss = True
    stays_within = True

    def __call__(
        self, budget: Attack, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, terms: Terms
    ) -> torch.Tensor:
        return pgd(
            model,
            images,
            labels,
            alpha=budget.alpha,
            steps=budget.steps,
            restarts=budget.restarts,
            random_start=budget.random_start,
            loss=budget.loss,
            stop_when_fooled=budget.stop_when_fooled,
            batch_size=terms.batch_size,
            generator=terms.draws,
            mask=terms.within,
            eps=terms.eps,
            norm=terms.norm,
            assume_checked=terms.assume_checked,
        )

    def refills(self, budget: Attack) -> bool:
        return budget.stop_when_fooled
