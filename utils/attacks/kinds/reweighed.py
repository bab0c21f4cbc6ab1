"""PGD on a vote's members, those that are right weighing most."""

from __future__ import annotations

import torch
from torch import nn

from utils.attacks.attack import Attack, Kind, Terms, register
from utils.attacks.reweighed import reweighed_pgd


@register("reweighed")
class Reweighed(Kind):
    """PGD on the members of a vote, those that are right weighing most (after Yu et al., 2022, arXiv:2211.08008)."""

    title = "Re-weighted PGD-{steps}"
    options = ()

    def __call__(
        self, budget: Attack, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, terms: Terms
    ) -> torch.Tensor:
        return reweighed_pgd(
            model,  # type: ignore[arg-type] # checked there
            images,
            labels,
            steps=budget.steps,
            alpha=budget.alpha,
            generator=terms.draws,
            eps=terms.eps,
            norm=terms.norm,
            assume_checked=terms.assume_checked,
        )
