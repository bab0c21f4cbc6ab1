"""Draw the figures of the models again, from their records."""

from __future__ import annotations

from pathlib import Path

from utils.attacks.suites import SUITES
from utils.commands.boundary import command
from utils.commands.options import Radius
from utils.core.paths import ROOT
from utils.data.sets import load_splits
from utils.data.workspace import Workspace
from utils.experiments.folds import SUMMARY
from utils.experiments.records import known_titles
from utils.reporting.atlas import redraw_atlas
from utils.reporting.atlas_figures import save_atlas
from utils.reporting.combinations import save_combinations
from utils.reporting.embedding import EMBEDDING, redraw_embedding
from utils.reporting.figures import redraw
from utils.reporting.hero import save_hero
from utils.reporting.patient_figures import save_fold_figures
from utils.reporting.robustness_figures import NOTEBOOKS, draw_all
from utils.reporting.style import save_figure
from utils.training.checkpoints import RECORD


@command("python -m utils figures")
def main(
    *,
    root: Path = ROOT,
    data: Path | None = None,
    models: tuple[str, ...] = (),
    hero: str | None = None,
    eps: Radius = 2 / 255,
) -> None:
    """Draw the figures of the models, of the atlases and of the folds again, from their records.

    Args:
        root: holds checkpoints/ and assets/.
        data: folder of prepared *_set.pt; without it pictures of slices stay as they are.
        models: titles, such as ResNet34_atk; without it all that have a record.
        hero: only draw assets/hero.png and attack_sweep.gif, with the model of this title and its hardened twin.
        eps: radius for --hero, such as 2/255 or 0.005.
    """
    if hero and not data:
        raise ValueError("--hero needs --data, the folder of the prepared images")
    workspace = Workspace.open("" if root == ROOT else str(root), data_dir=str(data or ""))
    splits = load_splits(workspace.data_dir) if data else None
    if hero and splits:
        print(*save_hero(workspace, hero, splits, eps), sep="\n")
        return
    titles = models or tuple(title for title in known_titles() if (workspace.checkpoint(title) / RECORD).is_file())
    if not titles:
        raise FileNotFoundError(f"no records in {workspace.root / 'checkpoints'}; run a notebook first")
    for title in titles:
        for path in redraw(workspace, title, splits):
            print(path)
    # weak suites first, so that where a figure is drawn twice the stronger one stays
    for suite in (NOTEBOOKS, *SUITES):
        for path, figure in draw_all(workspace, suite).items():
            print(save_figure(figure, path))
    if not models:
        print(*redraw_atlas(workspace, splits), sep="\n")
        for folder in sorted(workspace.root.glob("benchmarks/atlases/*")):
            print(*save_atlas(folder), sep="\n")
        for path in sorted(workspace.root.glob(f"assets/*/{EMBEDDING}")):
            print(redraw_embedding(path))
        for path in sorted(workspace.root.glob(f"benchmarks/cross_validation/*/{SUMMARY}")):
            print(*save_fold_figures(path.parent), sep="\n")
        for path in sorted(workspace.root.glob(f"benchmarks/combinations/*/{SUMMARY}")):
            print(save_combinations(path.parent))
