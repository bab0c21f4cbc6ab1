"""FGSM in several steps, without a random start."""

from __future__ import annotations

import torch
from torch import nn

from utils.attacks.attack import Attack, Kind, Terms, register
from utils.attacks.gradient import pgd


@register("ifgsm")
class IFGSM(Kind):
    """FGSM in several steps from the image itself (Kurakin et al., 2017, arXiv:1607.02533); also called BIM."""

    title = "I-FGSM-{steps}"
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
            random_start=False,
            loss=budget.loss,
            mask=terms.within,
            eps=terms.eps,
            norm=terms.norm,
            assume_checked=terms.assume_checked,
        )
