"""Random search that sees the answers alone."""

from __future__ import annotations

import torch
from torch import nn

from utils.attacks.attack import Attack, Kind, Terms, register
from utils.attacks.library import square


@register("square")
class Square(Kind):
    """Random search that sees the answers alone (Andriushchenko et al., 2020, arXiv:1912.00049); steps are queries."""

    title = "Square-{steps}"
    options = ()
    sees = "answers"

    def __call__(
        self, budget: Attack, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, terms: Terms
    ) -> torch.Tensor:
        return square(
            model,
            images,
            labels,
            queries=budget.steps,
            seed=terms.seed,
            eps=terms.eps,
            norm=terms.norm,
            assume_checked=terms.assume_checked,
        )
