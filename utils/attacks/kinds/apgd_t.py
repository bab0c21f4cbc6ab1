"""APGD towards each of the likeliest wrong classes."""

from __future__ import annotations

import torch
from torch import nn

from utils.attacks.apgd import apgd_targeted
from utils.attacks.attack import Attack, Kind, Terms, register


@register("apgd_t")
class APGDTargeted(Kind):
    """APGD towards each of the likeliest wrong classes (Croce and Hein, 2020, arXiv:2003.01690)."""

    title = "APGD-T-{steps}"
    options = ()

    def __call__(
        self, budget: Attack, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, terms: Terms
    ) -> torch.Tensor:
        return apgd_targeted(
            model,
            images,
            labels,
            steps=budget.steps,
            n_targets=budget.targets,
            generator=terms.draws,
            eps=terms.eps,
            norm=terms.norm,
            assume_checked=terms.assume_checked,
        )

    def steps(self, budget: Attack) -> int:
        return budget.steps * budget.targets
