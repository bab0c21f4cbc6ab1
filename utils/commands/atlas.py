"""Measure the attack atlas."""

from __future__ import annotations

from pathlib import Path

from utils.commands.boundary import command
from utils.core.checks import number, whole
from utils.data.sets import DataSplits, data_note, load_splits
from utils.data.workspace import Workspace, pick_device
from utils.experiments.atlas.bench import HARDENED, PLAIN, QUICK, AtlasBudget, open_bench
from utils.experiments.atlas.chapters import chapter_path, check_chapters, measure_chapter
from utils.experiments.folds import fold_of
from utils.training.checkpoints import checkpoint_folder, load_checkpoint


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
    fold: int | None = None,
    n_folds: int = 5,
    validation_share: float = 0.15,
    seed: int = 0,
) -> None:
    """Attack a model and its hardened twin in every way, on the same patients; each chapter leaves a file.

    Args:
        model: that is not hardened; folder in checkpoints/, or a path.
        hardened: its hardened twin.
        out: folder of the records.
        data: folder of prepared *_set.pt; without it dataset/dataset_variables.
        root: holds checkpoints/; without it this repository.
        chapters: only these: names, targets, regions, universal, patients, survival, foreign, scans, bracket.
        quick: a budget that only shows that everything runs.
        fold: models and patients are those of this fold of python -m utils folds.
        n_folds: of that run.
        validation_share: of that run.
        seed: of all draws.
    """
    wanted = check_chapters(chapters)
    whole("--seed", seed, 0)
    number("--validation-share", validation_share, above=0, below=1)
    workspace = Workspace.open(str(root or ""), data_dir=str(data or ""))
    folders = {
        name: checkpoint_folder(text if Path(text).is_dir() else workspace.checkpoint(text))
        for name, text in ((PLAIN, model), (HARDENED, hardened))
    }
    splits = _sides(load_splits(workspace.data_dir), fold, n_folds, seed, validation_share)
    loaded = {
        name: load_checkpoint(folder, classes=splits.classes, fingerprint=splits.fingerprint)[0]
        for name, folder in folders.items()
    }
    bench = open_bench(loaded, splits, budget=QUICK if quick else AtlasBudget(), seed=seed, device=pick_device())
    print(f"{len(bench.stacks)} test patients, {len(bench.slices)} slices, on {bench.device}", flush=True)
    note = "; ".join(filter(None, ["quick run: these numbers mean nothing" if quick else "", data_note(splits.info)]))
    for chapter in wanted:
        measure_chapter(bench, chapter.name, out, note=note)
        print(chapter_path(out, chapter.name), flush=True)


def _sides(splits: DataSplits, fold: int | None, n_folds: int, seed: int, validation_share: float) -> DataSplits:
    return splits if fold is None else fold_of(splits, fold, n_folds, seed, validation_share)
