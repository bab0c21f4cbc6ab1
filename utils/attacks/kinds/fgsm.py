"""One step along the sign of the gradient."""

from __future__ import annotations

import torch
from torch import nn

from utils.attacks.attack import Attack, Kind, Terms, register
from utils.attacks.gradient import fgsm


@register("fgsm")
class FGSM(Kind):
    """One step along the sign of the gradient (Goodfellow et al., 2015, arXiv:1412.6572)."""

    title = "FGSM"
    options = ()
    takes_loss = True

    def __call__(
        self, budget: Attack, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, terms: Terms
    ) -> torch.Tensor:
        return fgsm(
            model, images, labels, loss=budget.loss, eps=terms.eps, norm=terms.norm, assume_checked=terms.assume_checked
        )

    def steps(self, budget: Attack) -> int:
        return 1
