"""Options that several commands have in common, each with one meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from utils.core.radii import parse_radius, radius_label
from utils.experiments.budget import Budget
from utils.training.config import parse_trainable


def _radius(_: Any, tokens: Sequence[Any]) -> float:
    return parse_radius(str(tokens[0].value))


def _trainable(_: Any, tokens: Sequence[Any]) -> str | int:
    return parse_trainable(str(tokens[0].value))


#: An L-infinity radius in the notation of :mod:`utils.core.radii`.
Radius = Annotated[float, Parameter(converter=_radius, n_tokens=1, metavar="EPS", show_default=radius_label)]
#: What is trained, see :meth:`models.def_models.MRIClassifier.freeze`.
Trainable = Annotated[str | int, Parameter(converter=_trainable, n_tokens=1, metavar="all|head|N")]


@dataclass(frozen=True)
class BudgetOptions(Budget):
    """A budget as it is typed."""

    eps: Radius = 2 / 255
    trainable: Trainable = "all"


#: Each field of a budget as an option of its own.
BudgetFields = Annotated[BudgetOptions, Parameter(name="*")]
