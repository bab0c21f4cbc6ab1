"""PGD that means to survive what happens to an image before the model sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from utils.attacks.attack import Attack, Kind, Terms, register
from utils.attacks.views import eot_pgd
from utils.core.checks import whole

_SAMPLES = 5


@register("eot")
class ExpectationPGD(Kind):
    """PGD on the expected loss over saving, windowing, resizing and turning (Athalye et al., 2018, arXiv:1707.07397).

    The answer that counts is that to the image as it is, so that it can be weaker than PGD there.
    """

    title = "EOT-PGD-{steps}"

    def __call__(
        self, budget: Attack, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, terms: Terms
    ) -> torch.Tensor:
        return eot_pgd(
            model,
            images,
            labels,
            steps=budget.steps,
            samples=budget.options.get("samples", _SAMPLES),
            alpha=budget.alpha,
            generator=terms.draws,
            eps=terms.eps,
            norm=terms.norm,
            assume_checked=terms.assume_checked,
        )

    def steps(self, budget: Attack) -> int:
        return budget.steps * budget.options.get("samples", _SAMPLES)

    def check_options(self, options: Mapping[str, Any]) -> None:
        if set(options) - {"samples"}:
            raise ValueError("EOT-PGD takes the option samples, the number of views a step, and no other")
        whole("samples", options.get("samples", _SAMPLES), 1)
