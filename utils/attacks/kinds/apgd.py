"""PGD that halves its step by itself."""

from __future__ import annotations

import torch
from torch import nn

from utils.attacks.apgd import apgd
from utils.attacks.attack import Attack, Kind, Terms, register


@register("apgd")
class APGD(Kind):
    """PGD that halves its step by itself (Croce and Hein, 2020, arXiv:2003.01690)."""

    title = "APGD-{steps}"
    options = ()
    takes_loss = True

    def __call__(
        self, budget: Attack, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, terms: Terms
    ) -> torch.Tensor:
        return apgd(
            model,
            images,
            labels,
            steps=budget.steps,
            loss=budget.loss,
            generator=terms.draws,
            eps=terms.eps,
            norm=terms.norm,
            assume_checked=terms.assume_checked,
        )
