"""Steps towards classes of one's choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from utils.attacks.attack import Attack, Kind, Terms, register
from utils.attacks.targets import check_target, target_label, targeted_pgd


class _Targeted(Kind):
    starts_at_image = False
    stays_within = True

    def __call__(
        self, budget: Attack, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, terms: Terms
    ) -> torch.Tensor:
        return targeted_pgd(
            model,
            images,
            labels,
            target=budget.options["target"],
            alpha=budget.alpha,
            steps=budget.steps,
            random_start=budget.random_start and not self.starts_at_image,
            generator=terms.draws,
            mask=terms.within,
            eps=terms.eps,
            norm=terms.norm,
            assume_checked=terms.assume_checked,
        )

    def title_of(self, budget: Attack) -> str:
        return f"{super().title_of(budget)} to {target_label(budget.options['target'])}"

    def check_options(self, options: Mapping[str, Any]) -> None:
        if set(options) != {"target"}:
            raise ValueError("a targeted attack takes the option target, such as target=least_likely, and no other")
        check_target(options["target"])


@register("ifgsm_t")
class TargetedIFGSM(_Targeted):
    """I-FGSM towards classes (Kurakin et al., 2017, arXiv:1607.02533, section 2.3)."""

    title = "I-FGSM-{steps}"
    starts_at_image = True


@register("pgd_t")
class TargetedPGD(_Targeted):
    """PGD towards classes, from a random start."""

    title = "PGD-{steps}"
