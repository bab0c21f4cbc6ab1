"""Combine slices and models by patient."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from utils.attacks.suites import check_suite
from utils.commands.boundary import command
from utils.core.checks import whole
from utils.core.paths import DATASET_VARIABLES, ROOT, check_folder, write_json
from utils.data.classes import healthy_place
from utils.data.sets import load_splits
from utils.experiments.combine import (
    combination_specification,
    combine_fold,
    refuse_other_combination,
    weights_of_members,
)
from utils.experiments.folds import SUMMARY, VALIDATION_SHARE, fold_of, read_folds, summarise
from utils.reporting.combinations import save_combinations


@command("python -m utils combine")
def main(
    *,
    members: tuple[str, ...],
    out: Path,
    data: Path = DATASET_VARIABLES,
    work: Path = ROOT / "runs" / "cross_validate",
    state: Literal["plain", "hardened"] = "hardened",
    question: Literal["ill", "classes"] = "ill",
    n_folds: int = 5,
    folds: tuple[int, ...] = (),
    n_slices: int = 8,
    suite: str = "brief",
    precision: Literal["auto", "fp32", "bf16"] = "fp32",
    seed: int = 0,
    validation_share: float = VALIDATION_SHARE,
) -> None:
    """Combine slices and models by patient (mean, attention, GRU, blend, stack) and attack each as one system.

    Each fold leaves a file in --out and is not done again.

    Args:
        members: experiments of `python -m utils folds`, by the last part of their --out.
        out: folder of the results.
        data: folder of prepared *_set.pt.
        work: folder in which the folds left their weights.
        state: which model of each fold.
        question: what is asked of a patient and attacked: whether it is ill, or which class it has.
        n_folds: number of folds, as in the experiments.
        folds: only these, counted from 0; without it all.
        n_slices: slices of each patient, evenly spaced.
        suite: which attacks: smoke, quick, brief, targeted, standard or full.
        precision: of the attacks' passes; answers count in float32.
        seed: of the folds, of the heads and of the attacks.
        validation_share: as in the experiments.
    """
    check_suite(suite)
    whole("--n-slices", n_slices, 1)
    check_folder(out)
    splits = load_splits(data)
    if question == "ill":
        healthy_place(splits.classes, "; ask for them all, --question classes")
    wanted = combination_specification(members, state, question, n_slices, suite, precision, seed)
    sides = {fold: fold_of(splits, fold, n_folds, seed, validation_share) for fold in folds or range(n_folds)}
    weights = {fold: weights_of_members(work, members, fold, state) for fold in sides if not _path(out, fold).is_file()}
    for path, stored in read_folds(out).items():
        fold = stored.data.fold
        own = sides.get(fold) or fold_of(splits, fold, n_folds, seed, validation_share)
        refuse_other_combination(path, own, wanted, _weights_left(work, members, fold, state))
    for fold in weights:
        combine_fold(
            sides[fold],
            work=work,
            names=members,
            state=state,
            question=question,
            n_slices=n_slices,
            suite=suite,
            precision=precision,
            seed=seed,
            target=_path(out, fold),
        )
    write_json(out / SUMMARY, summarise(out).plain())
    print(save_combinations(out))


def _path(out: Path, fold: int) -> Path:
    return out / f"fold{fold}.json"


def _weights_left(work: Path, members: tuple[str, ...], fold: int, state: str) -> dict[str, str]:
    """Those of a finished fold's members, whose weights may be gone."""
    try:
        return weights_of_members(work, members, fold, state)
    except FileNotFoundError:
        return {}
