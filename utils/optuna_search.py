"""Hyperparameter search with Optuna: seeded, pruned, resumable, chosen by validation alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna

from models.def_models import MRIClassifier
from utils.config import TrainConfig
from utils.data import DataSplits
from utils.objectives import Standard
from utils.paths import read_json, write_json
from utils.reproducibility import derived_seed, environment_facts, seed_everything
from utils.training import train

#: name -> ("log" | "float", low, high) or ("choice", values). Names are fields of ``TrainConfig``,
#: ``augmentation_strength``, or ``trainable`` (see ``MRIClassifier.freeze``).
SEARCH_SPACE: dict[str, tuple] = {
    "learning_rate": ("log", 1e-4, 3e-3),
    "weight_decay": ("log", 1e-4, 1e-1),
    "batch_size": ("choice", (32, 64, 128)),
    "optimizer": ("choice", ("adamw", "adam", "sgd")),
    "scheduler": ("choice", ("onecycle", "cosine", "step", "constant")),
    "augmentation_strength": ("float", 0.0, 2.0),
}


def optuna_search(
    make_model: Callable[[], MRIClassifier],
    splits: DataSplits,
    *,
    num_epochs: int,
    n_trials: int,
    out: str | Path,
    space: Mapping[str, tuple] | None = None,
    objective: Standard | None = None,
    config: TrainConfig | None = None,
    seed: int = 0,
    journal: str | Path | None = None,
) -> dict[str, Any]:
    """Search, then write the best hyperparameters and the study's facts to ``out`` as JSON.

    Args:
        make_model: returns a fresh model for each trial.
        num_epochs: epochs a trial.
        n_trials: trials in all; a journal that holds some already is only filled up.
        space: see ``SEARCH_SPACE``, which is the default.
        objective: recipe; None is standard training.
        config: values of everything that is not searched.
        seed: of sampler and training.
        journal: file in which several processes share the study and an interrupted one goes on.

    Returns:
        what was written: ``params``, ``value``, ``selected_by`` and facts.

    Raises:
        ValueError: an entry of ``space`` is malformed, or the journal is of another search.
    """
    space = dict(space or SEARCH_SPACE)
    config = replace(config or TrainConfig(), num_epochs=num_epochs, seed=seed, patience=0)
    study = optuna.create_study(
        study_name="search",
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1),
        storage=_journal(journal),
        load_if_exists=True,
    )
    _claim(study, {"fingerprint": splits.fingerprint, "num_epochs": num_epochs, "space": _listed(space)}, journal)
    # a study that goes on must not draw its first trials again
    study.sampler = optuna.samplers.TPESampler(seed=derived_seed(seed, len(study.trials)) % 2**32)

    def run(trial: optuna.Trial) -> float:
        params = {name: _suggest(trial, name, bounds) for name, bounds in space.items()}
        return _score(trial, make_model, splits, objective, apply_hyperparams(config, params), params)

    missing = n_trials - sum(trial.state.is_finished() for trial in study.trials)
    if missing > 0:
        study.optimize(run, n_trials=missing, show_progress_bar=True)
    result = _facts(study, space, config, splits, seed)
    write_json(Path(out), result)
    return result


def _listed(space: Mapping[str, tuple]) -> dict[str, list]:
    return {name: [list(b) if isinstance(b, tuple) else b for b in bounds] for name, bounds in space.items()}


def _claim(study: optuna.Study, facts: dict[str, Any], journal: str | Path | None) -> None:
    """Note what a study is about, or refuse to mix it with another."""
    for name, value in facts.items():
        if study.user_attrs.get(name, value) != value:
            raise ValueError(
                f"{journal} holds a search with another {name} ({study.user_attrs[name]}, not {value}); "
                "use another journal file"
            )
        study.set_user_attr(name, value)


def _journal(path: str | Path | None) -> Any:
    if path is None:
        return None
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))


def _suggest(trial: optuna.Trial, name: str, bounds: tuple) -> Any:
    kind, *rest = bounds
    if kind == "choice":
        return trial.suggest_categorical(name, list(rest[0]))
    if kind in ("log", "float") and len(rest) == 2:
        return trial.suggest_float(name, *rest, log=kind == "log")
    raise ValueError(f"search space of {name} must be ('log'|'float', low, high) or ('choice', values), not {bounds}")


def _score(
    trial: optuna.Trial,
    make_model: Callable[[], MRIClassifier],
    splits: DataSplits,
    objective: Standard | None,
    config: TrainConfig,
    params: dict[str, Any],
) -> float:
    seed_everything(config.seed)
    model = make_model()
    if "trainable" in params:
        model.freeze(params["trainable"])
    key = "validation_robust_accuracy" if objective and objective.attack_steps else "validation_balanced_accuracy"

    def report(entry: dict[str, float]) -> None:
        trial.report(entry[key], entry["epoch"])
        if trial.should_prune():
            raise optuna.TrialPruned

    result = train(model, splits, objective=objective, config=config, on_epoch=report)
    return max(entry[key] for entry in result.history)


def apply_hyperparams(config: TrainConfig, params: Mapping[str, Any]) -> TrainConfig:
    """``config`` with the values of ``params``, as :func:`optuna_search` names them."""
    values = {name: value for name, value in params.items() if name not in ("augmentation_strength", "trainable")}
    augmentation = config.augmentation
    if "augmentation_strength" in params:
        augmentation = replace(augmentation, strength=params["augmentation_strength"])
    return replace(config, augmentation=augmentation, **values)


def _facts(
    study: optuna.Study, space: dict[str, tuple], config: TrainConfig, splits: DataSplits, seed: int
) -> dict[str, Any]:
    states = [trial.state.name.lower() for trial in study.trials]
    return {
        "params": study.best_params,
        "value": study.best_value,
        "trials": {state: states.count(state) for state in sorted(set(states))},
        "epochs_per_trial": config.num_epochs,
        "space": _listed(space),
        "seed": seed,
        "data": splits.info,
        "environment": environment_facts(),
    }


def load_hyperparams(path: str | Path) -> dict[str, Any]:
    """The parameters in a file that :func:`optuna_search` wrote.

    Raises:
        FileNotFoundError: no such file; the message says how to make one.
        ValueError: the file does not hold hyperparameters of this project.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; set load_existing_hyperparams = False to search for them")
    content = read_json(Path(path))
    if not isinstance(content.get("params") if isinstance(content, dict) else None, dict):
        raise ValueError(f"{path} holds no 'params'; set load_existing_hyperparams = False to search again")
    known = {*TrainConfig.__dataclass_fields__, "augmentation_strength", "trainable"}
    unknown = set(content["params"]) - known
    if unknown:
        raise ValueError(f"{path} names unknown hyperparameters: {', '.join(sorted(unknown))}")
    return content["params"]
