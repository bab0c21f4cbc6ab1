"""Compare ways of hardening."""

from __future__ import annotations

from pathlib import Path

from utils.commands.boundary import command
from utils.commands.options import BudgetFields, BudgetOptions
from utils.core.checks import choice
from utils.core.paths import DATASET_VARIABLES, ROOT, check_folder, write_json
from utils.data.sets import load_splits
from utils.experiments.recipe_summary import SUMMARY, summarise, summary_table
from utils.experiments.recipes import CLEAN, RECIPE_VARIANTS, VARIANTS, check_runs, run_seed, score_baselines
from utils.reporting.experiment_figures import recipes_figure
from utils.reporting.style import save_figure


@command("python -m utils recipes")
def main(
    *,
    out: Path,
    data: Path = DATASET_VARIABLES,
    backbone: str = "resnet34",
    variants: tuple[str, ...] = tuple(RECIPE_VARIANTS),
    seeds: tuple[int, ...] = (0, 1, 2),
    work: Path = ROOT / "runs" / "compare_recipes",
    budget: BudgetFields = BudgetOptions(),  # noqa: B008 - frozen
) -> None:
    """Compare ways of hardening over several seeds, chosen by validation patients alone.

    Each run leaves a file in --out and is not done again; several processes may work on different seeds or variants.

    Args:
        out: folder of the results.
        data: folder of prepared *_set.pt.
        backbone: dino_v2, resnet34, efficientnet_b0, or one of your own in models/def_models.py.
        variants: keys of VARIANTS in utils/experiments/recipes.py, or all.
        seeds: one clean model and its hardened ones for each.
        work: folder of weights and unfinished runs.
    """
    names = list(VARIANTS) if variants == ("all",) else list(variants)
    for name in names:
        choice("--variants", name, VARIANTS)
    check_folder(out)
    check_folder(work)
    splits = load_splits(data)
    # all of them before the first is trained: what cannot be done is said at once
    if not all((out / f"{name}_seed{seed}.json").is_file() for name in (CLEAN, *names) for seed in seeds):
        check_runs(splits, backbone, names, seeds, budget)
    for seed in seeds:
        run_seed(splits, backbone=backbone, variants=names, seed=seed, budget=budget, out=out, work=work / out.name)
    summary = summarise(out, score_baselines(splits))
    write_json(out / SUMMARY, summary.plain())
    save_figure(recipes_figure(summary), (out / SUMMARY).with_suffix(".png"))
    print(summary_table(summary).to_string())
