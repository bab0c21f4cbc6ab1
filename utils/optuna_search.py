"""Hyperparameter search with Optuna: seeded, pruned, resumable, chosen by validation alone.

``python -m utils search --backbone resnet34 --n-trials 20`` searches from the command line; started several
times with the same ``--journal`` and different ``--worker``, the processes share one study.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna

from models.def_models import MRIClassifier
from utils.attacks.suites import SUITES
from utils.core.checks import number, whole
from utils.core.paths import check_writable, read_json, write_json
from utils.core.reproducibility import derived_seed, environment_facts, seed_everything
from utils.data.sets import DataSplits
from utils.evaluation.attack_cache import describe_module
from utils.evaluation.metrics import scores
from utils.evaluation.worst_case import robustness_curve
from utils.experiments.optuna_journal import WORKER, at_work, open_journal, try_again
from utils.experiments.search_space import (
    HARDENING_SPACE,
    SEARCH_SPACE,
    apply_hyperparams,
    apply_to_objective,
    given_values,
    listed_space,
    suggest,
)
from utils.training.config import TrainConfig
from utils.training.loop import train
from utils.training.objectives import Hardening, Standard

#: What the kept epoch of each hardening trial is scored by; PGD-10 alone decides which trials get that far.
RESCORE = SUITES["brief"]


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
    clean_floor: float = 0.0,
    pareto: bool = False,
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
        space: see ``SEARCH_SPACE``, which is the default. The first trial takes the values of ``config`` and
            ``objective`` where it allows them, so that a short search does not end below them unseen.
        objective: recipe; None is standard training, scored by balanced accuracy on validation images. Trials of a
            recipe that attacks are pruned by balanced accuracy under PGD-10 on them, and the kept epoch of those that
            are left is scored by the worst case of ``RESCORE``.
        config: values of everything that is not searched.
        clean_floor: hardening only: the least balanced accuracy without attack of a trial that may win, 0..1.
        pareto: hardening only: maximise accuracy with and without attack together, without pruning; among the trials
            that no other beats in both, the most robust one above ``clean_floor`` gives the parameters.
        seed: of sampler and training.
        journal: file in which several processes share the study and an interrupted one goes on.
        worker: number of this process, so that workers that start together draw different trials.

    Returns:
        what was written: ``params``, ``value``, ``selected_by``, ``history`` of all trials, ``importance`` and facts;
        ``floor_reached`` is False where no trial reached ``clean_floor`` and the one with the best accuracy without
        attack was taken.

    Raises:
        ValueError: an entry of ``space`` is malformed, the journal is of another search, or ``clean_floor`` or
            ``pareto`` are given for training without attack.
    """
    space = dict(space or SEARCH_SPACE)
    objective = objective or Standard()
    whole("n_trials", n_trials, 1)
    whole("num_epochs", num_epochs, 1)
    whole("worker", worker, 0)
    number("clean_floor", clean_floor, least=0, below=1)
    if (pareto or clean_floor) and not objective.attacks:
        raise ValueError("clean_floor and pareto are for hardening; standard training has one accuracy only")
    check_writable(Path(out))
    config = replace(config or TrainConfig(), num_epochs=num_epochs, seed=seed, patience=0)
    study = _open_study(journal, pareto)
    about = {
        **_start_of_trials(make_model, seed),
        "fingerprint": splits.fingerprint,
        "num_epochs": num_epochs,
        "space": listed_space(space),
        "objective": objective.as_dict(),
        "clean_floor": clean_floor,
        "pareto": pareto,
        "config": {name: value for name, value in config.as_dict().items() if name != "num_epochs"},
    }
    _claim(study, about, journal)

    def run(trial: optuna.Trial) -> float | tuple[float, float]:
        trial.set_user_attr(WORKER, worker)
        params = {name: suggest(trial, name, bounds) for name, bounds in space.items()}
        recipe = apply_to_objective(objective, params)
        clean, robust = _score(trial, make_model, splits, recipe, apply_hyperparams(config, params), params)
        if robust is None:
            return clean
        return (clean, robust) if pareto else robust

    with at_work(journal, worker):
        if not study.trials:
            study.enqueue_trial(given_values(space, config, objective), skip_if_exists=True)
        try_again(study, journal, worker)
        # a study that goes on must not draw its first trials again
        study.sampler = _sampler(derived_seed(seed, len(study.trials), worker) % 2**32, clean_floor)
        _fill_up(study, run, n_trials)
    result = _facts(study, about, splits, seed)
    write_json(Path(out), result)
    return result


def _open_study(journal: str | Path | None, pareto: bool) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # a line a trial is printed by the search itself
    return optuna.create_study(
        study_name="search",
        directions=["maximize"] * (2 if pareto else 1),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1),
        storage=open_journal(journal) if journal else None,
        load_if_exists=True,
    )


def _fill_up(study: optuna.Study, run: Callable[[optuna.Trial], Any], n_trials: int) -> None:
    """Run trials until the study has ``n_trials`` that finished."""
    missing = n_trials - len(_finished(study))
    if missing <= 0:
        return
    enough = optuna.study.MaxTrialsCallback(n_trials, states=_FINISHED)
    # a trial that diverges is a bad trial, not the end of the search
    study.optimize(
        run,
        n_trials=missing,
        callbacks=[enough, _print_trial],
        catch=(FloatingPointError,),
        show_progress_bar=True,
    )


def _start_of_trials(make_model: Callable[[], MRIClassifier], seed: int) -> dict[str, Any]:
    """What every trial starts from."""
    seed_everything(seed)
    model = make_model()
    return {
        "backbone": model.backbone_name,
        "image_size": model.image_size,
        "seed": seed,
        "start": describe_module(model),
        "trainable": sum(parameter.requires_grad for parameter in model.parameters()),
    }


#: The importance of a hyperparameter is a guess from fewer finished trials than these.
FEWEST_FOR_IMPORTANCE = 10
_FINISHED = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)


def _finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=_FINISHED)


def _print_trial(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    entry = _entry(trial, trial.state.name.lower())
    value = "no value" if entry["value"] is None else f"{entry['value']:.3f}"
    params = (f"{name} {own:.3g}" if isinstance(own, float) else f"{name} {own}" for name, own in trial.params.items())
    print(f"trial {trial.number} {entry['state']}: {value} with {', '.join(params)}", flush=True)


def _claim(study: optuna.Study, facts: dict[str, Any], journal: str | Path | None) -> None:
    """Note what a study is about, or refuse to mix it with another.

    Raises:
        ValueError: it is about something else; the message names everything that differs.
    """
    wanted = json.loads(json.dumps(facts))
    changed = [name for name, value in wanted.items() if study.user_attrs.get(name, value) != value]
    # a journal from before these were noted was of some search, and nobody knows which
    unknown = [name for name in wanted if study.trials and name not in study.user_attrs]
    if changed or unknown:
        told = [_difference(name, study.user_attrs[name], wanted[name]) for name in changed]
        told += [f"{', '.join(unknown)} (not noted)"] if unknown else []
        raise ValueError(f"{journal} holds a search with another {'; '.join(told)}; use another journal file")
    for name, value in wanted.items():
        study.set_user_attr(name, value)


def _difference(name: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        return f"{name} ({', '.join(f'{key} {old.get(key)!r}, not {new.get(key)!r}' for key in keys)})"
    return f"{name} ({old}, not {new})"


def _sampler(seed: int, clean_floor: float) -> optuna.samplers.TPESampler:
    """TPE; with a floor, trials below it count as worse than any above."""
    if not clean_floor:
        return optuna.samplers.TPESampler(seed=seed)
    with warnings.catch_warnings():
        # experimental in Optuna 4, about to be renamed in 5: this spelling serves both
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.simplefilter("ignore", FutureWarning)
        return optuna.samplers.TPESampler(
            seed=seed, constraints_func=lambda trial: (clean_floor - trial.user_attrs.get("clean", 0.0),)
        )


def _score(
    trial: optuna.Trial,
    make_model: Callable[[], MRIClassifier],
    splits: DataSplits,
    objective: Standard,
    config: TrainConfig,
    params: dict[str, Any],
) -> tuple[float, float | None]:
    """Balanced accuracy on validation images of the kept epoch, and its worst case under ``RESCORE`` if it attacks."""
    seed_everything(config.seed)
    model = make_model()
    if "trainable" in params:
        model.freeze(params["trainable"])
    prunes = len(trial.study.directions) == 1

    def report(entry: dict[str, float]) -> None:
        if prunes:
            trial.report(entry[_pruned_by(objective)], int(entry["epoch"]))
            if trial.should_prune():
                raise optuna.TrialPruned

    result = train(model, splits, objective=objective, config=config, on_epoch=report)
    clean = result.history[result.best_epoch]["validation_balanced_accuracy"]
    trial.set_user_attr("clean", clean)
    if not isinstance(objective, Hardening):
        return clean, None
    part = splits.validation.balanced_subset(config.validation_images, seed=config.seed)
    curve = robustness_curve(
        model,
        part,
        attack=RESCORE,
        epsilons=[objective.eps],
        seed=config.seed,
        batch_size=config.batch_size,
        device=next(model.parameters()).device,
    )
    robust = scores(curve.logits[1].softmax(1), part.labels, part.classes).balanced_accuracy
    trial.set_user_attr("robust", robust)
    return clean, robust


def _pruned_by(objective: Standard) -> str:
    return "validation_robust_accuracy" if objective.attacks else "validation_balanced_accuracy"


def _facts(study: optuna.Study, about: dict[str, Any], splits: DataSplits, seed: int) -> dict[str, Any]:
    trials = study.get_trials(deepcopy=False)
    states = [trial.state.name.lower() for trial in trials]
    best = _choose(study, about["clean_floor"])
    hardened = "robust" in best.user_attrs
    return {
        "params": best.params,
        "value": best.user_attrs["robust" if hardened else "clean"],
        "selected_by": "validation_worst_case" if hardened else "validation_balanced_accuracy",
        "attacks": [attack.title for attack in RESCORE] if hardened else [],
        "clean_floor": about["clean_floor"],
        "floor_reached": best.user_attrs["clean"] >= about["clean_floor"],
        "pareto": about["pareto"],
        "chosen": best.number,
        "trials": {state: states.count(state) for state in sorted(set(states))},
        "history": [_entry(trial, state) for trial, state in zip(trials, states)],
        "importance": _importance(study),
        "epochs_per_trial": about["num_epochs"],
        "objective": about["objective"],
        "space": about["space"],
        "seed": seed,
        "data": splits.info,
        "environment": environment_facts(),
    }


def _entry(trial: optuna.trial.FrozenTrial, state: str) -> dict[str, Any]:
    """One trial as plain values; ``value`` of a pruned one is what it was pruned by."""
    value = trial.user_attrs.get("robust", trial.user_attrs.get("clean"))
    if value is None and trial.intermediate_values:
        value = trial.intermediate_values[max(trial.intermediate_values)]
    return {"number": trial.number, "state": state, "value": value, "params": trial.params, **trial.user_attrs}


def _choose(study: optuna.Study, clean_floor: float) -> optuna.trial.FrozenTrial:
    """The most robust finished trial above the floor; where none is, the one that comes closest to it."""
    complete = study.get_trials(deepcopy=False, states=_FINISHED[:1])
    if not complete:
        failed = len(study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.FAIL]))
        why = f"all {failed} diverged or were killed; lower learning_rate" if failed else "run more trials"
        raise ValueError(f"no trial was finished: {why}")
    able = [trial for trial in complete if trial.user_attrs["clean"] >= clean_floor]
    if not able:
        return max(complete, key=lambda trial: trial.user_attrs["clean"])
    return max(able, key=lambda trial: (trial.user_attrs.get("robust", 0.0), trial.user_attrs["clean"]))


def _importance(study: optuna.Study) -> dict[str, float]:
    """Share of the variance that each hyperparameter explains (Hutter et al., 2014); none from few or equal trials."""
    values = [trial.values[-1] for trial in study.get_trials(states=_FINISHED[:1])]
    if len(values) < FEWEST_FOR_IMPORTANCE or len(set(values)) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator, target=lambda trial: trial.values[-1])
    return dict(found)


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
    known = {*TrainConfig.__dataclass_fields__, *SEARCH_SPACE, *HARDENING_SPACE}
    unknown = set(content["params"]) - known
    if unknown:
        raise ValueError(f"{path} names unknown hyperparameters: {', '.join(sorted(unknown))}")
    return content["params"]


if __name__ == "__main__":
    import sys

    from utils.commands.search import main

    sys.exit(main())  # type: ignore[has-type]  # the command imports this module
