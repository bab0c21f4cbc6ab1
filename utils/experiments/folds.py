"""Every patient tested once, by a model that never saw them: cross-validation grouped by patient.

    python -m utils folds --backbone resnet34 --image-size 64 --out FOLDER

For each fold a clean model is trained and hardened by the default recipe. Each fold leaves a JSON file with its answers
in FOLDER and is not done again; several processes may work on different folds. ``summary.json`` and ``summary.png`` are
made from these files over the patients of all folds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.attacks.attack import describe
from utils.attacks.suites import SUITES
from utils.core.checks import LARGEST_SEED, number, whole
from utils.core.parts import read_part
from utils.core.paths import write_json
from utils.core.reproducibility import environment_facts
from utils.data.sets import DataSplits, ImageSet, resplit
from utils.data.splits import SPLITS, fold_sides
from utils.data.workspace import pick_device
from utils.evaluation.baselines import baseline_answers
from utils.evaluation.intervals import report
from utils.evaluation.metrics import predict
from utils.evaluation.probe import fit_head
from utils.evaluation.worst_case import robustness_curve
from utils.experiments.budget import Budget, weights_name
from utils.experiments.fold_records import (
    FROZEN,
    Counts,
    FoldRecord,
    FoldsData,
    FoldsRow,
    FoldsSummary,
    Whose,
    binary_by_patient,
)
from utils.experiments.paired import paired_gains, rankings
from utils.experiments.patient_odds import scores_at_thresholds, threshold_of
from utils.experiments.recipes import EPSILONS, VARIANTS, claim, harden, specification, start_of, train_clean
from utils.experiments.specification import differing, images_fingerprint, refuse_other
from utils.training.checkpoints import load_checkpoint, trained_before

#: The default way of hardening, a key of :data:`utils.experiments.recipes.VARIANTS`; see ``benchmarks/recipes``.
VARIANT = "adversarial_full"
PLAIN, HARD = "not hardened", "hardened"
SUMMARY = "summary.json"
_ANOTHER, _REMEDY = "give an --out of another name", "delete it, and it is made again"


#: Share of the patients that are not tested who validate, unless another is asked for.
VALIDATION_SHARE = 0.25


def fold_of(
    splits: DataSplits, fold: int, n_folds: int, seed: int, validation_share: float = VALIDATION_SHARE
) -> DataSplits:
    """One fold over all images of a patient split.

    Args:
        validation_share: of the patients that are not tested.

    Raises:
        ValueError: another split, no such fold or seed, or too few patients.
    """
    if splits.info["protocol"] != "patient":
        raise ValueError(f"cross-validation is by patient; prepare with --split patient, not {splits.info['protocol']}")
    subjects, labels = (
        torch.cat([getattr(part, name) for _, part in splits]).numpy() for name in ("subjects", "labels")
    )
    whole("seed", seed, 0, LARGEST_SEED)
    if n_folds >= 2 and not 0 <= fold < n_folds:
        raise ValueError(f"there are folds 0 to {n_folds - 1}, not {fold}")
    number("--validation-share", validation_share, above=0, below=1)
    sides = _sides(subjects, labels, fold, n_folds, seed, validation_share)
    if sides is None:
        raise ValueError(_too_few(subjects, labels, n_folds, seed, validation_share))
    return resplit(splits, sides, fold=fold, n_folds=n_folds, fold_seed=seed)


def _sides(
    subjects: np.ndarray, labels: np.ndarray, fold: int, n_folds: int, seed: int, share: float
) -> np.ndarray | None:
    """As :func:`fold_sides`, or None where there are too few patients for so many folds, or for so few."""
    if not 2 <= n_folds <= len(np.unique(subjects)):
        return None
    try:
        sides = fold_sides(subjects, labels, fold=fold, n_folds=n_folds, validation=share, seed=seed)
    except ValueError:  # fewer images of each class than folds
        return None
    return sides if set(SPLITS) <= set(sides) else None


def _too_few(subjects: np.ndarray, labels: np.ndarray, n_folds: int, seed: int, share: float) -> str:
    """The message for that, with numbers of folds that work."""

    def works(n: int) -> bool:
        return all(_sides(subjects, labels, fold, n, seed, share) is not None for fold in range(n))

    n_patients = len(np.unique(subjects))
    able = [str(n) for n in range(2, min(n_patients, 10) + 1) if works(n)]
    return (
        f"{n_patients} patients cannot be tested in {n_folds} folds: each fold needs patients to train on, to test, "
        "and in one class four that are not tested, of whom one validates; "
        + (f"give --n-folds {' or '.join(able)}" if able else "no number of folds works, prepare more patients")
    )


def fold_specification(
    splits: DataSplits,
    backbone: str,
    n_folds: int,
    seed: int,
    budget: Budget,
    variant: str = VARIANT,
    validation_share: float = VALIDATION_SHARE,
) -> dict[str, Any]:
    """Everything that the folds of one experiment share, as plain values; ``fingerprint`` is of each fold's own sides.

    Args:
        splits: the prepared data, not a fold.
        variant: how the clean model is hardened.
        validation_share: of the patients of a fold that are not tested.
    """
    shared = specification(splits, backbone, budget)
    del shared["fingerprint"]
    folds = {"n_folds": n_folds, "fold_seed": seed, "seed": seed, "recipe": variant}
    folds["validation_share"] = validation_share
    return shared | folds | {"images": images_fingerprint(splits)}


def read_fold(path: Path) -> FoldRecord:
    """The file of one fold.

    Raises:
        ValueError: it is not whole, or bears the name of another fold; the message names it.
    """
    record = read_part(FoldRecord, path, _REMEDY)
    if path.name != f"fold{record.data.fold}.json":
        raise ValueError(f"{path} holds fold {record.data.fold}, so it was copied or renamed; {_REMEDY}")
    return record


def read_folds(out: Path) -> dict[Path, FoldRecord]:
    """The file of each fold in ``out``, in the order of their names.

    Raises:
        ValueError: see :func:`read_fold`; also models or baselines of one that are not those of the first.
    """
    folds = {path: read_fold(path) for path in sorted(out.glob("fold*.json"))}
    for path, fold in folds.items():
        first = next(iter(folds.values()))
        for kind in ("models", "baselines"):
            own, theirs = (set(getattr(one, kind)) for one in (fold, first))
            if own != theirs:
                told = ", ".join(sorted(own ^ theirs))
                raise ValueError(f"{path} and {next(iter(folds))} do not have the same {kind} ({told}); {_REMEDY}")
    return folds


def _facts_of(fold: FoldRecord) -> dict[str, Any]:
    """The :func:`fold_specification` of a stored fold, as far as older files tell it."""
    told: dict[str, Any] = {"n_folds": fold.data.n_folds, "fold_seed": fold.data.fold_seed, "seed": fold.seed}
    told |= {"epsilons": fold.epsilons, "attacks": fold.attacks, "backbone": fold.model.get("backbone")}
    return {**asdict(fold.budget), **told, **fold.specification}


def refuse_other_folds(out: Path, splits: DataSplits, wanted: Mapping[str, Any]) -> None:
    """Refuse folds in ``out`` that another experiment left there.

    Args:
        splits: the prepared data.
        wanted: of :func:`fold_specification`.

    Raises:
        ValueError: a fold of other settings or other data, or a file that is not whole; the message names it.
    """
    for path, stored in read_folds(out).items():
        if set(stored.models) != {PLAIN, HARD}:
            raise ValueError(f"{path} holds the models {', '.join(stored.models) or 'none'}; {_ANOTHER}")
        refuse_other(path, _facts_of(stored), wanted, _ANOTHER)
        facts = (wanted["n_folds"], wanted["fold_seed"], wanted.get("validation_share", VALIDATION_SHARE))
        own = fold_of(splits, stored.data.fold, *facts)
        refuse_other(path, {"fingerprint": stored.data.fingerprint}, {"fingerprint": own.fingerprint}, _ANOTHER)


def model_folders(work: Path) -> dict[str, Path]:
    """Name -> folder of each model of a fold, below the folder of its weights."""
    return {PLAIN: work / "plain", HARD: work / "hardened"}


def run_fold(
    splits: DataSplits,
    *,
    backbone: str,
    seed: int,
    budget: Budget,
    target: Path,
    work: Path,
    shared: Mapping[str, Any],
) -> None:
    """Train, harden and score one fold, as far as that is not done yet.

    Args:
        splits: of :func:`fold_of`.
        target: JSON file to write.
        work: folder of weights and unfinished runs.
        shared: of :func:`fold_specification`.
    """
    claim(work, {**shared, "fingerprint": splits.fingerprint})
    folders = model_folders(work)
    if not trained_before(folders[PLAIN]):
        train_clean(splits, backbone, seed, budget, folders[PLAIN])
    if not trained_before(folders[HARD]):
        harden(splits, VARIANTS[shared["recipe"]], seed, budget, folders[PLAIN], folders[HARD])
    few = splits.test.balanced_subset(budget.max_images)
    record: dict[str, Any] = {
        "data": splits.info,
        "specification": dict(shared),
        "budget": asdict(budget) | {"weights": weights_name(budget.weights)},
        "seed": seed,
        "epsilons": [0.0, *EPSILONS],
        "attacks": [attack["title"] for attack in describe(SUITES[budget.suite])],
        "classes": splits.classes,
        "validation": Whose.of(splits.validation).plain(),
        "test": Whose.of(splits.test).plain(),
        "attacked": Whose.of(few).plain(),
        "baselines": {name: _rounded(logits) for name, logits in _baselines(splits, backbone, seed, budget).items()},
        "models": {},
        "environment": environment_facts(),
    }
    device = pick_device()
    for name, folder in folders.items():
        model, own = load_checkpoint(folder, classes=splits.classes, fingerprint=splits.fingerprint)
        model.to(device)
        curve = robustness_curve(
            model,
            few,
            attack=SUITES[budget.suite],
            epsilons=EPSILONS,
            seed=seed,
            device=device,
            cache=work / "attack_cache",
        )
        record["model"] = own.model.plain()
        record["models"][name] = {
            "training": own.trained.plain(),
            "validation": _rounded(predict(model, splits.validation, device=device)),
            "logits": _rounded(predict(model, splits.test, device=device)),
            "attacked": [_rounded(logits) for logits in curve.logits],
        }
    write_json(target, record)


def _baselines(splits: DataSplits, backbone: str, seed: int, budget: Budget) -> dict[str, torch.Tensor]:
    """Name -> logits of all test images; published weights are also a baseline as they are, with a fitted head."""
    found = baseline_answers(splits)
    if budget.weights != "scratch":
        device = pick_device()
        model = start_of(splits, backbone, seed, budget).to(device)
        fit_head(model, splits.train.join(splits.validation), device=device)
        found[FROZEN] = predict(model, splits.test, device=device)
    return found


def _rounded(logits: torch.Tensor) -> list[list[float]]:
    """Answers with four places; a row whose greatest would become one of two is kept whole, with its verdict."""
    rows = []
    for row in logits.tolist():
        short = [round(value, 4) for value in row]
        rows.append(row if short.count(max(short)) > 1 else short)
    return rows


def summarise(out: Path) -> FoldsSummary:
    """All metrics over the patients of all folds in ``out``, and AUROC by fold.

    Answers of different folds come from different models, so a ranking over all patients also asks that their scales
    agree; the mean over folds, which tables and figures show, does not.

    Raises:
        FileNotFoundError: no folds there.
        ValueError: folds of other data, models or budgets, or one patient tested twice.
    """
    folds = list(read_folds(out).values())
    if not folds:
        raise FileNotFoundError(f"no finished folds in {out}")
    facts = [
        {"source": fold.data.source, "budget": asdict(fold.budget), "model": fold.model, "classes": fold.classes}
        | _facts_of(fold)
        for fold in folds
    ]
    other = [name for one in facts[1:] for name in differing(facts[0], one)]
    if other:
        raise ValueError(f"{out} holds folds with other {', '.join(dict.fromkeys(other))}; use a folder for each")
    patients = [set(fold.test.subjects) for fold in folds]
    if len(set().union(*patients)) != sum(map(len, patients)):
        raise ValueError(f"{out} holds folds that test the same patient")
    first = folds[0]
    return FoldsSummary(
        folds=[fold.data.fold for fold in folds],
        rows=_rows(folds),
        epsilons=first.epsilons,
        attacks=first.attacks,
        classes=first.classes,
        budget=first.budget,
        model=first.model,
        seed=first.seed,
        n_images=Counts(
            test=sum(len(fold.test.labels) for fold in folds),
            attacked=sum(len(fold.attacked.labels) for fold in folds),
        ),
        n_subjects=sum(map(len, patients)),
        data=FoldsData(
            source=first.data.source,
            protocol=first.data.protocol,
            n_folds=first.data.n_folds,
            fold_seed=first.data.fold_seed,
        ),
        environment=environment_facts(),
    )


def _rows(folds: Sequence[FoldRecord]) -> dict[str, FoldsRow]:
    """Baselines, then models."""
    test = [fold.test.bare(fold.classes) for fold in folds]
    attacked = [fold.attacked.bare(fold.classes) for fold in folds]
    first = folds[0]
    rows = {
        name: _pooled(test, [[fold.baselines[name] for fold in folds]]).model_copy(
            update={"ranking": rankings(folds, name)}
        )
        for name in first.baselines
    }
    for name in first.models:
        own = [fold.models[name] for fold in folds]
        steps = [[one.attacked[step] for one in own] for step in range(len(first.epsilons))]
        found = _pooled(test, [[one.logits for one in own]])
        same = {"ranking": rankings(folds, name, attacked=True)}
        update: dict[str, Any] = {"attacked": _pooled(attacked, steps).model_copy(update=same)}
        update |= {"ranking": rankings(folds, name), "gains": paired_gains(folds, name)}
        update["checks"] = [one.checks for one in own if one.checks]
        thresholds = [cut for fold, one in zip(folds, own) if (cut := threshold_of(fold, one)) is not None]
        if len(thresholds) == len(folds):
            clean = (test, [one.logits for one in own])
            sides = [clean, *((attacked, step) for step in steps[1:])]
            update["at_threshold"] = [scores_at_thresholds(part, logits, thresholds) for part, logits in sides]
        rows[name] = found.model_copy(update=update)
    return rows


def _pooled(sets: Sequence[ImageSet], steps: Sequence[Sequence[list]]) -> FoldsRow:
    """Metrics over all folds for each radius, and the binary patient AUROC of each fold.

    Args:
        sets: the images of each fold.
        steps: for each radius the logits of each fold.
    """
    everyone = sets[0]
    for part in sets[1:]:
        everyone = everyone.join(part)
    alone = [[report(torch.tensor(own), part) for own, part in zip(logits, sets)] for logits in steps]
    return FoldsRow(
        metrics=[report(torch.cat([torch.tensor(own) for own in logits]), everyone) for logits in steps],
        auroc_by_fold=[[binary_by_patient(one).auroc for one in found] for found in alone],
    )
