"""The atlas as a notebook shows it: each chapter measured or read, its figure and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from models.def_models import MRIClassifier
from utils.data.sets import DataSplits, load_splits
from utils.data.stacks import patient_stacks
from utils.data.workspace import Workspace
from utils.experiments.atlas.bench import HARDENED, PLAIN, QUICK, AtlasBudget, Bench, flat, weights_digest
from utils.experiments.atlas.chapters import CHAPTERS, chapter_path, measure_chapter, read_chapter
from utils.experiments.folds import fold_of
from utils.experiments.records import ENSEMBLE
from utils.reporting.atlas_figures import FIGURES, caption, corruption_sheet, save_atlas
from utils.reporting.atlas_tables import ATLAS_TABLES, vote_table
from utils.reporting.robustness_figures import worst_cases
from utils.reporting.style import save_figure
from utils.training.checkpoints import RECORD, checkpoint_folder, load_checkpoint, read_record

#: Table -> its chapter; the others need all that were measured.
_CHAPTER_OF = {
    **{name: name for name in ("names", "regions", "universal", "patients", "survival", "foreign", "scans", "bracket")},
    **dict.fromkeys(("directions", "verdicts", "asked"), "targets"),
    "fooled": "foreign",
    **dict.fromkeys(("severities", "worst_scan"), "scans"),
}
#: Folder of the atlas in ``assets/``, and its picture that no record tells.
ATLAS, SHEET = "Atlas", "corruptions.png"
#: Folds and validation share of the fold models; see :mod:`utils.experiments.folds`.
N_FOLDS, VALIDATION_SHARE = 5, 0.15


class Table:
    """A Markdown table that a notebook shows as one."""

    def __init__(self, text: str) -> None:
        self.text = text

    def _repr_markdown_(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return self.text


class Atlas:
    """Chapters of one bench in one folder.

    Args:
        bench: of :func:`utils.experiments.atlas.bench.open_bench`.
        folder: of records and figures.
        note: of :meth:`utils.data.workspace.Workspace.note`.
    """

    def __init__(self, bench: Bench, folder: str | Path, *, note: str = "") -> None:
        self.bench, self.folder, self.note = bench, Path(folder), note

    def __repr__(self) -> str:
        models = "; ".join(f"{name}: threshold {cut:.2f}" for name, cut in self.bench.thresholds.items())
        patients = f"{len(self.bench.stacks)} test patients, {self.bench.budget.slices} slices each"
        return "; ".join(filter(None, [patients, models, self.note]))

    def show(self, figure: str) -> Figure:
        """A figure of :data:`utils.reporting.atlas_figures.FIGURES`, drawn and saved; its chapter is measured first."""
        chapter, draw = FIGURES[figure]
        record, found = self._chapter(chapter)
        drawn = draw(found, caption(record))
        save_figure(drawn, self.folder / f"{figure}.png")
        return drawn

    def table(self, name: str) -> Table:
        """A table of :data:`utils.reporting.atlas_tables.ATLAS_TABLES`, without ``atlas_``."""
        if name in _CHAPTER_OF:
            return Table(ATLAS_TABLES[f"atlas_{name}"](self._chapter(_CHAPTER_OF[name])))
        done = [read_chapter(self.folder, own) for own in CHAPTERS if chapter_path(self.folder, own).is_file()]
        return Table(ATLAS_TABLES[f"atlas_{name}"](done))

    def sheet(self) -> Figure:
        """One slice of the first test patient as every kind of bad scan, drawn and saved."""
        drawn = sheet_of(self.bench.splits, self.note)
        save_figure(drawn, self.folder / SHEET)
        return drawn

    def _chapter(self, name: str) -> tuple[Any, Any]:
        measure_chapter(self.bench, name, self.folder, note=self.note)
        return read_chapter(self.folder, name)


def attacked_vote(workspace: Workspace) -> Table:
    """The vote of ``results.ipynb`` under each attack alone and under all, or who makes it.

    Raises:
        ValueError: its record is not whole, or tells of no attack.
    """
    folder = workspace.checkpoint(ENSEMBLE)
    if not (folder / RECORD).is_file():
        return Table("No vote has been attacked yet; `results.ipynb` lets the hardened models vote, and attacks them.")
    worst = worst_cases({ENSEMBLE: read_record(folder)})
    if ENSEMBLE not in worst:
        raise ValueError(f"{folder / RECORD} tells of no attack on the vote; run results.ipynb again")
    return Table(vote_table(worst[ENSEMBLE]))


def sheet_of(splits: DataSplits, note: str = "") -> Figure:
    """The middle slice of the first test patient as every kind of bad scan."""
    return corruption_sheet(flat(patient_stacks(splits.test, 1)).pixels(slice(0, 1)), note)


def redraw_atlas(workspace: Workspace, splits: DataSplits | None) -> list[Path]:
    """Draw the figures of a workspace's atlas again from their records; the sheet of scans where there are images."""
    folder = workspace.assets(ATLAS)
    paths, done = save_atlas(folder), [name for name in CHAPTERS if chapter_path(folder, name).is_file()]
    if not paths or not splits:
        return paths
    note = read_chapter(folder, done[0])[0].note
    return [*paths, save_figure(sheet_of(splits, note), folder / SHEET)]


def atlas_budget(profile: str) -> AtlasBudget:
    """What a profile spends."""
    return QUICK if profile == "quick" else AtlasBudget()


def atlas_splits(
    workspace: Workspace, *, fold: int = -1, n_folds: int = N_FOLDS, validation_share: float = VALIDATION_SHARE
) -> DataSplits:
    """The prepared split, or a fold over all its patients where ``fold`` is not negative.

    Raises:
        ValueError: no such fold.
    """
    splits = load_splits(workspace.data_dir)
    return splits if fold < 0 else fold_of(splits, fold, n_folds, 0, validation_share)


def atlas_models(workspace: Workspace, model: str, hardened: str, splits: DataSplits) -> dict[str, MRIClassifier]:
    """The two models of an atlas, by folder of ``checkpoints/`` or path.

    Raises:
        FileNotFoundError, ValueError: see :func:`utils.training.checkpoints.load_checkpoint`; also where both are the
            same weights, of two backbones or sizes, or the training of one was not what it is given as.
    """
    found = {}
    for name, text in ((PLAIN, model), (HARDENED, hardened)):
        folder = checkpoint_folder(text if Path(text).is_dir() else workspace.checkpoint(text))
        found[name], record = load_checkpoint(folder, classes=splits.classes, fingerprint=splits.fingerprint)
        recipe = record.training.objective if record.training else None
        if recipe and recipe.hardens != (name == HARDENED):
            raise ValueError(f"{folder} was trained by the recipe {recipe.name}, so it is not the one that is {name}")
    kinds = [f"{model.backbone_name} at {model.image_size} px" for model in found.values()]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{model} is {kinds[0]} and {hardened} is {kinds[1]}: name a model, and its hardened twin")
    if weights_digest(found[PLAIN]) == weights_digest(found[HARDENED]):
        raise ValueError(f"{model} and {hardened} are the same weights: name a model, and its hardened twin")
    return found
