"""Hyperparameter search with Optuna: seeded, pruned, resumable, chosen by validation alone.

``python -m utils.optuna_search --backbone resnet34 --n-trials 20`` searches from the command line; started several
times with the same ``--journal`` and different ``--worker``, the processes share one study.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna

from models.def_models import BACKBONES, MRIClassifier, build_model
from utils.config import TrainConfig
from utils.data import DataSplits, load_splits
from utils.objectives import Standard
from utils.paths import CHECKPOINTS, DATASET_VARIABLES, read_json, write_json
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
    "trainable": ("choice", ("head", 2, "all")),
}


def pick_space(names: Sequence[str] = (), *, freezing: bool = True) -> dict[str, tuple]:
    """The entries of ``SEARCH_SPACE`` with these names, or all of them for none.

    Args:
        freezing: False leaves ``trainable`` out where no names are given: freezing random weights is pointless.

    Raises:
        ValueError: a name that it does not have.
    """
    unknown = set(names) - set(SEARCH_SPACE)
    if unknown:
        raise ValueError(f"search_space names {', '.join(sorted(unknown))}; known: {', '.join(SEARCH_SPACE)}")
    every = [name for name in SEARCH_SPACE if freezing or name != "trainable"]
    return {name: SEARCH_SPACE[name] for name in names or every}


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
    worker: int = 0,
) -> dict[str, Any]:
    """Search, then write the best hyperparameters and the study's facts to ``out`` as JSON.

    Several processes that are given the same ``journal`` and different ``worker`` numbers share one study. One that
    is killed loses its running trial and nothing else.

    Args:
        make_model: returns a fresh model for each trial.
        num_epochs: epochs a trial.
        n_trials: trials in all, over all workers; a journal that holds some already is only filled up.
        space: see ``SEARCH_SPACE``, which is the default.
        objective: recipe; None is standard training, scored by balanced accuracy on validation images. A recipe
            that attacks is scored by balanced accuracy under PGD-10 on them.
        config: values of everything that is not searched.
        seed: of sampler and training.
        journal: file in which several processes share the study and an interrupted one goes on.
        worker: number of this process, so that workers that start together draw different trials.

    Returns:
        what was written: ``params``, ``value``, ``selected_by``, ``history`` of all trials, ``importance`` and facts.

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
    about = {
        "fingerprint": splits.fingerprint,
        "num_epochs": num_epochs,
        "space": _listed(space),
        "objective": (objective or Standard()).as_dict(),
    }
    _claim(study, about, journal)
    # a study that goes on must not draw its first trials again
    study.sampler = optuna.samplers.TPESampler(seed=derived_seed(seed, len(study.trials), worker) % 2**32)

    def run(trial: optuna.Trial) -> float:
        params = {name: _suggest(trial, name, bounds) for name, bounds in space.items()}
        return _score(trial, make_model, splits, objective, apply_hyperparams(config, params), params)

    missing = n_trials - len(_finished(study))
    if missing > 0:
        enough = optuna.study.MaxTrialsCallback(n_trials, states=_FINISHED)
        study.optimize(run, n_trials=missing, callbacks=[enough], show_progress_bar=True)
    result = _facts(study, about, _selected_by(objective or Standard()), splits, seed)
    write_json(Path(out), result)
    return result


_FINISHED = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)


def _finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=_FINISHED)


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
    key = _selected_by(objective or Standard())

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


def _selected_by(objective: Standard) -> str:
    return "validation_robust_accuracy" if objective.attack_steps else "validation_balanced_accuracy"


def _facts(
    study: optuna.Study, about: dict[str, Any], selected_by: str, splits: DataSplits, seed: int
) -> dict[str, Any]:
    trials = study.get_trials(deepcopy=False)
    states = [trial.state.name.lower() for trial in trials]
    return {
        "params": study.best_params,
        "value": study.best_value,
        "selected_by": selected_by,
        "trials": {state: states.count(state) for state in sorted(set(states))},
        "history": [
            {"number": t.number, "state": state, "value": t.value, "params": t.params}
            for t, state in zip(trials, states)
        ],
        "importance": _importance(study),
        "epochs_per_trial": about["num_epochs"],
        "objective": about["objective"],
        "space": about["space"],
        "seed": seed,
        "data": splits.info,
        "environment": environment_facts(),
    }


def _importance(study: optuna.Study) -> dict[str, float]:
    """Share of the variance that each hyperparameter explains (Hutter et al., 2014), or nothing where all are alike."""
    values = [trial.value for trial in study.get_trials(states=_FINISHED[:1])]
    if len(set(values)) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


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


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m utils.optuna_search", description=__doc__.split(":")[0])
    parser.add_argument("--backbone", choices=sorted(BACKBONES), required=True)
    parser.add_argument("--data", type=Path, default=DATASET_VARIABLES, help="folder of prepared *_set.pt")
    parser.add_argument("--n-trials", type=int, required=True, help="in all, over all workers")
    parser.add_argument("--num-epochs", type=int, default=3, help="epochs a trial (default 3)")
    parser.add_argument(
        "--space", nargs="*", default=[], metavar="NAME", help=f"default: all of {' '.join(SEARCH_SPACE)}"
    )
    parser.add_argument("--weights", default="scratch", help="scratch, pretrained or a path (default scratch)")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--journal", type=Path, help="file that workers share and an interrupted search goes on from")
    parser.add_argument("--worker", type=int, default=0, help="number of this process")
    parser.add_argument("--out", type=Path, help="default: checkpoints/optuna_params/<Model>.json")
    args = parser.parse_args(arguments)
    try:
        space = pick_space(args.space, freezing=args.weights != "scratch")
        splits = load_splits(args.data)
        options = {"num_classes": len(splits.classes), "image_size": args.image_size, "weights": args.weights}
        found = optuna_search(
            partial(build_model, args.backbone, **options),
            splits,
            num_epochs=args.num_epochs,
            n_trials=args.n_trials,
            out=args.out or CHECKPOINTS / "optuna_params" / f"{BACKBONES[args.backbone].title}.json",
            space=space,
            seed=args.seed,
            journal=args.journal,
            worker=args.worker,
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"best {found['selected_by']} {found['value']:.1%} with {found['params']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
