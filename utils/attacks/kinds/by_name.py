"""Every attack of torchattacks under its name there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from utils.attacks.attack import Attack, Kind, Terms, register
from utils.attacks.library import BLACK_BOX, LIBRARY, check_library_classes, check_library_options, library_attack

#: Those that take no number of steps.
_NO_STEPS = ("FGSM", "FFGSM", "Pixle", "AutoAttack")


class LibraryKind(Kind):
    """One attack of torchattacks (Kim, 2020, arXiv:2010.01950)."""

    library_name: ClassVar[str]

    def __call__(
        self, budget: Attack, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, terms: Terms
    ) -> torch.Tensor:
        return library_attack(
            self.library_name,
            model,
            images,
            labels,
            steps=budget.steps,
            alpha=budget.alpha,
            seed=terms.seed,
            options=budget.options,
            eps=terms.eps,
            norm=terms.norm,
            assume_checked=terms.assume_checked,
        )

    def steps(self, budget: Attack) -> int:
        return 1 if self.library_name in _NO_STEPS else budget.steps

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_library_options(self.library_name, options)

    def check_classes(self, classes: int) -> None:
        check_library_classes(self.library_name, classes)


for _name, _norms in LIBRARY.items():
    _facts = {
        "library_name": _name,
        "title": f"{_name} of torchattacks" if _name in _NO_STEPS else f"{_name}-{{steps}} of torchattacks",
        "sees": "answers" if _name in BLACK_BOX else "gradient",
        "norms": _norms,
    }
    register(_name)(type(_name, (LibraryKind,), _facts))
