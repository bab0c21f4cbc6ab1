"""Test every patient once: cross-validation grouped by patient."""

from __future__ import annotations

from pathlib import Path

from utils.commands.boundary import command
from utils.commands.options import BudgetFields, BudgetOptions
from utils.core.checks import choice, whole
from utils.core.paths import DATASET_VARIABLES, ROOT, check_folder, write_json
from utils.data.sets import load_splits
from utils.experiments.fold_checks import check_fold, check_weights
from utils.experiments.folds import (
    SUMMARY,
    VALIDATION_SHARE,
    VARIANT,
    fold_of,
    fold_specification,
    refuse_other_folds,
    run_fold,
    summarise,
)
from utils.experiments.recipes import VARIANTS, check_runs
from utils.reporting.patient_figures import save_fold_figures


@command("python -m utils folds")
def main(
    *,
    out: Path,
    data: Path = DATASET_VARIABLES,
    backbone: str = "resnet34",
    variant: str = VARIANT,
    n_folds: int = 5,
    folds: tuple[int, ...] = (),
    seed: int = 0,
    validation_share: float = VALIDATION_SHARE,
    work: Path = ROOT / "runs" / "cross_validate",
    panel_images: int = 0,
    budget: BudgetFields = BudgetOptions(),  # noqa: B008 - frozen
) -> None:
    """Test every patient once: train, harden and attack a model for each fold.

    Each fold leaves a file in --out and is not done again; several processes may work on different folds.

    Args:
        out: folder of the results.
        data: folder of prepared *_set.pt.
        backbone: dino_v2, resnet34, efficientnet_b0, or one of your own in models/def_models.py.
        variant: how each clean model is hardened; a key of VARIANTS in utils/experiments/recipes.py.
        n_folds: number of folds.
        folds: only these, counted from 0; without it all.
        seed: of the folds, of the trainings and of the attacks.
        validation_share: of the patients of a fold that are not tested, who validate.
        work: folder of weights and unfinished runs.
        panel_images: test images of each fold for the gradient checks, also of folds finished before; 0 leaves them
            out.
    """
    choice("--variant", variant, VARIANTS)
    whole("--panel-images", panel_images, 0)
    check_folder(out)
    check_folder(work)
    splits = load_splits(data)
    wanted = folds or tuple(range(n_folds))
    # each is cut before the first is trained: what cannot be done is said at once
    for fold in wanted or (0,):
        fold_of(splits, fold, n_folds, seed, validation_share)
    shared = fold_specification(splits, backbone, n_folds, seed, budget, variant, validation_share)
    refuse_other_folds(out, splits, shared)
    if not all((out / f"fold{fold}.json").is_file() for fold in wanted):
        check_runs(splits, backbone, (variant,), (seed,), budget)
    if panel_images:
        for fold in wanted:
            check_weights(out / f"fold{fold}.json", work / out.name / f"fold{fold}", panel_images)
    for fold in wanted:
        target, place = out / f"fold{fold}.json", work / out.name / f"fold{fold}"
        own = fold_of(splits, fold, n_folds, seed, validation_share)
        if not target.is_file():
            print(f"fold {fold}", flush=True)
            run_fold(own, backbone=backbone, seed=seed, budget=budget, target=target, work=place, shared=shared)
        if panel_images:
            check_fold(target, own, work=place, images=panel_images)
    write_json(out / SUMMARY, summarise(out).plain())
    print(*save_fold_figures(out), sep="\n")
