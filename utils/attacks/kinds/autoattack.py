"""The standard version."""

from __future__ import annotations

import torch
from torch import nn

from utils.attacks.attack import Attack, Kind, Terms, register
from utils.attacks.library import auto_attack, check_autoattack

#: Its parts, about: APGD, three targets each of APGD and of FAB, and half of Square's 5,000 queries, which need no
#: gradient.
STEPS = 3500


@register("autoattack")
class AutoAttack(Kind):
    """The standard version (Croce and Hein, 2020, arXiv:2003.01690)."""

    title = "AutoAttack"
    options = ()
    sees = "both"

    def __call__(
        self, budget: Attack, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, terms: Terms
    ) -> torch.Tensor:
        return auto_attack(
            model, images, labels, seed=terms.seed, eps=terms.eps, norm=terms.norm, assume_checked=terms.assume_checked
        )

    def steps(self, budget: Attack) -> int:
        return STEPS

    def check_classes(self, classes: int) -> None:
        check_autoattack(classes)
