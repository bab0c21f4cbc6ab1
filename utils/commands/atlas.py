"""Measure the attack atlas."""

from __future__ import annotations

from pathlib import Path

from utils.commands.boundary import command
from utils.core.checks import LARGEST_SEED, number, whole
from utils.core.paths import check_folder
from utils.data.sets import data_note
from utils.data.workspace import Workspace, pick_device
from utils.experiments.atlas.bench import open_bench
from utils.experiments.atlas.chapters import chapter_path, check_chapters, measure_chapter
from utils.reporting.atlas import N_FOLDS, VALIDATION_SHARE, atlas_budget, atlas_models, atlas_splits
from utils.reporting.atlas_figures import save_atlas


@command("python -m utils atlas")
def main(
    *,
    model: str,
    hardened: str,
    out: Path,
    data: Path | None = None,
    root: Path | None = None,
    chapters: tuple[str, ...] = (),
    quick: bool = False,
    fold: int = -1,
    n_folds: int = N_FOLDS,
    validation_share: float = VALIDATION_SHARE,
    seed: int = 0,
) -> None:
    """Attack a model and its hardened twin in every way, on the same patients; each chapter leaves a file.

    A killed run goes on where it stopped.

    Args:
        model: that is not hardened; folder in checkpoints/, or a path.
        hardened: its hardened twin.
        out: folder of the records.
        data: folder of prepared *_set.pt; without it dataset/dataset_variables.
        root: holds checkpoints/; without it this repository.
        chapters: only these: names, targets, regions, universal, patients, survival, foreign, scans, bracket.
        quick: a budget that only shows that everything runs.
        fold: models and patients are those of this fold of python -m utils folds; -1 is the prepared split.
        n_folds: of that run.
        validation_share: of that run.
        seed: of all draws.
    """
    wanted = check_chapters(chapters)
    whole("--seed", seed, 0, LARGEST_SEED)
    whole("--fold", fold, -1)
    number("--validation-share", validation_share, above=0, below=1)
    check_folder(out)
    workspace = Workspace.open(str(root or ""), data_dir=str(data or ""))
    splits = atlas_splits(workspace, fold=fold, n_folds=n_folds, validation_share=validation_share)
    loaded = atlas_models(workspace, model, hardened, splits)
    budget = atlas_budget("quick" if quick else "full")
    bench = open_bench(loaded, splits, budget=budget, seed=seed, device=pick_device(), cache=workspace.attack_cache)
    print(f"{len(bench.stacks)} test patients, {len(bench.slices)} slices, on {bench.device}", flush=True)
    note = "; ".join(filter(None, ["quick run: these numbers mean nothing" if quick else "", data_note(splits.info)]))
    for chapter in wanted:
        measure_chapter(bench, chapter.name, out, note=note)
        print(chapter_path(out, chapter.name), flush=True)
    print(*save_atlas(out), sep="\n")
