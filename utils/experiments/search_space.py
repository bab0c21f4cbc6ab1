"""What a search may vary, and how its finds are applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import optuna

from utils.training.config import TrainConfig
from utils.training.objectives import Standard

#: name -> ("log" | "float", low, high) or ("choice", values). Names are fields of ``TrainConfig`` or of the objective,
#: ``augmentation_strength``, or ``trainable`` (see ``MRIClassifier.freeze``).
SEARCH_SPACE: dict[str, tuple] = {
    "learning_rate": ("log", 1e-4, 3e-3),
    "weight_decay": ("log", 1e-4, 1e-1),
    "batch_size": ("choice", (32, 64, 128)),
    "optimizer": ("choice", ("adamw", "adam", "sgd")),
    "scheduler": ("choice", ("onecycle", "cosine", "step", "constant")),
    "augmentation_strength": ("float", 0.0, 2.0),
    "trainable": ("choice", ("head", 2, "all")),
}
#: What can be searched beyond that when hardening; a recipe ignores what it does not know.
HARDENING_SPACE: dict[str, tuple] = {
    "adv_weight": ("float", 0.3, 1.0),
    "beta": ("log", 1.0, 10.0),
    "ramp": ("float", 0.0, 0.6),
    "ema_decay": ("choice", (0.0, 0.99)),
    "awp": ("choice", (0.0, 0.005)),
    "label_smoothing": ("choice", (0.0, 0.1)),
}


def pick_space(names: Sequence[str] = (), *, freezing: bool = True) -> dict[str, tuple]:
    """The entries of ``SEARCH_SPACE`` and ``HARDENING_SPACE`` with these names, or all of the first for none.

    Args:
        freezing: False leaves ``trainable`` out where no names are given: freezing random weights is pointless.

    Raises:
        ValueError: a name that it does not have.
    """
    known = SEARCH_SPACE | HARDENING_SPACE
    unknown = set(names) - set(known)
    if unknown:
        raise ValueError(f"search_space names {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    every = [name for name in SEARCH_SPACE if freezing or name != "trainable"]
    return {name: known[name] for name in names or every}


def listed_space(space: Mapping[str, tuple]) -> dict[str, list]:
    """As JSON holds it."""
    return {name: [list(b) if isinstance(b, tuple) else b for b in bounds] for name, bounds in space.items()}


def suggest(trial: optuna.Trial, name: str, bounds: tuple) -> Any:
    """A value for a trial.

    Raises:
        ValueError: an entry that is malformed; the message names it.
    """
    kind, *rest = bounds
    if kind == "choice":
        return trial.suggest_categorical(name, list(rest[0]))
    if kind in ("log", "float") and len(rest) == 2:
        return trial.suggest_float(name, *rest, log=kind == "log")
    raise ValueError(f"search space of {name} must be ('log'|'float', low, high) or ('choice', values), not {bounds}")


def given_values(space: Mapping[str, tuple], config: TrainConfig, objective: Standard) -> dict[str, Any]:
    """The values that hold without a search, as far as ``space`` allows them."""
    given = {**config.as_dict(), **objective.as_dict(), "augmentation_strength": config.augmentation.strength}
    return {name: given[name] for name, bounds in space.items() if name in given and _allows(bounds, given[name])}


def _allows(bounds: tuple, value: Any) -> bool:
    match bounds:
        case ("choice", values):
            return value in values
        case ("log" | "float", low, high):
            return value is not None and low <= value <= high
    return False


def apply_to_objective(objective: Standard, params: Mapping[str, Any]) -> Standard:
    """``objective`` with those of ``params`` that are its own."""
    return replace(objective, **{name: params[name] for name in params if name in objective.__dataclass_fields__})


def apply_hyperparams(config: TrainConfig, params: Mapping[str, Any]) -> TrainConfig:
    """``config`` with the values of ``params``, as :func:`optuna_search` names them."""
    values = {name: value for name, value in params.items() if name in TrainConfig.__dataclass_fields__}
    augmentation = config.augmentation
    if "augmentation_strength" in params:
        augmentation = replace(augmentation, strength=params["augmentation_strength"])
    return replace(config, augmentation=augmentation, **values)
