"""All figures of a folder ``assets/`` on one page that a browser opens from its path."""

from __future__ import annotations

import html
import os
from pathlib import Path

from utils.core.parts import read_part
from utils.core.paths import atomic_write, read_json
from utils.experiments.budget import describe_start
from utils.experiments.fold_records import FoldsSummary
from utils.experiments.folds import SUMMARY
from utils.experiments.records import display_name, known_titles

#: What each figure shows, by file name, or by folder and name where one folder shows something else.
CAPTIONS = {
    "hero": "One slice of a patient that no model has seen, its perturbation, and what two models say of it.",
    "leak_audit": "What a nearest neighbour scores on the usual split and on a split by patient.",
    "ch2_answer": "What a model says of Colin27, a whole head, and how little turns it around.",
    "ch2_steps": "Colin27 from the scan to the template, step by step.",
    "contact_sheet": "Slices of one patient of each class.",
    "attacks": "Robust accuracy of all models, by attack.",
    "worst_case_all": "Worst case over all attacks, of all models.",
    "worst_case": "Robust accuracy over all attacks, with its interval over patients.",
    "robustness_curve": "Robust accuracy by radius, under each attack alone.",
    "first_breaking": "At which radius each image is first misclassified.",
    "reliability": "How often the model is right where it is so sure.",
    "confusion_matrix": "True class against answer, without attack.",
    "loss_curve": "Loss by epoch, and the epoch whose weights were kept.",
    "accuracy_curve": "Accuracy by epoch, and the epoch whose weights were kept.",
    "adversarial_examples_fgsm": "Slices attacked by FGSM at each radius, beside their perturbation.",
    "adversarial_examples_pgd": "Slices attacked by PGD, beside their perturbation.",
    "grad_cam": "Where the answer comes from, as far as Grad-CAM can tell.",
    "step_size": "What a step too small hides: accuracy under PGD by its step size.",
    "recall": "Recall of each class before and after hardening.",
    "before_after": "Robust accuracy before and after hardening, on the same images.",
    "transfer_matrix": "Accuracy of each member on images that were made to fool another.",
    "optuna_history": "The trials of the hyperparameter search.",
    "optuna_importance": "Which hyperparameters mattered in the search.",
    "optuna_pareto": "Trials by accuracy with and without attack.",
    "corruptions": "One slice as every kind of scan that goes wrong by itself, at five severities.",
    "scans": "What scans that go wrong cost, and whether hardening helps.",
    "directions": "How many demented patients are turned to Non, and healthy ones to demented, by radius.",
    "reached": "How often a slice of each class gets the answer that the attacker wants.",
    "patients": "Within which radius a patient's verdict is turned, by how its slices may change.",
    "universal": "One change for all slices of all patients: how it looks, and whom it fools.",
    "regions": "What an attack inside a part of the slice is worth beside one on the whole.",
    "sufficient_regions": "Where the smallest parts lie that alone change an answer.",
    "survival": "What is left of an attack once the image was saved, windowed, resized or turned.",
    "detectors": "Detectors of foreign images, before and after they are attacked themselves.",
    "detectors_fooled": "Slices that are misclassified and still accepted by a detector.",
    "brackets": "For each patient what its answer is certified to bear, and where an attack turned it.",
    "summary": "AUROC by patient of models and baselines, without and under attack, each patient tested once.",
    "gains": "What each way to combine a patient's slices gains over the first, each patient tested once.",
    "roc": "Who is told from the healthy, without and under attack, each patient tested once.",
    "each_patient": "How ill each patient is called, without and under attack, each tested once.",
    "attack_sweep": "One slice of a patient that no model has seen, attacked ever harder, and two models' answers.",
    "embedding": "All test slices by how alike their pixels are: by class, and by patient.",
    "names": "What each attack leaves alone, ours and those of torchattacks.",
    "Ensemble/loss_curve": "Loss by epoch of the models that vote.",
    "Ensemble/accuracy_curve": "Accuracy by epoch of the models that vote.",
}
#: What the figures of a folder are called, and the folder of all their folders.
_EXPERIMENTS = {
    "Folds of": Path("benchmarks") / "cross_validation",
    "Combination:": Path("benchmarks") / "combinations",
    "Atlas of": Path("benchmarks") / "atlases",
}
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Figures</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
figure {{ margin: 2rem 0; }}
img {{ max-width: 100%; height: auto; }}
figcaption, .note {{ color: #555; }}
</style>
<h1>Figures</h1>
<p>Research code, not for clinical use. {source}</p>
{contents}
{sections}
</html>
"""


def gallery(root: Path) -> str:
    """The page for all pictures below ``root / "assets"``, models in the order of all tables, and of experiments.

    Raises:
        FileNotFoundError: there is no figure.
    """
    assets = root / "assets"
    groups: dict[str, list[Path]] = {}
    for path in sorted([*assets.rglob("*.png"), *assets.rglob("*.gif")]):
        groups.setdefault(path.parent.relative_to(assets).as_posix(), []).append(path)
    for kind, folder in _EXPERIMENTS.items():
        for path in sorted((root / folder).glob("*/*.png")):
            groups.setdefault(f"{kind} {path.parent.name}", []).append(path)
    if not groups:
        raise FileNotFoundError(f"no figures in {assets}; run the notebooks first")
    order = known_titles()
    names = sorted(groups, key=lambda name: (order.index(name) if name in order else -1, name))
    titles = {name: _title(name, groups[name][0].parent) for name in names}
    contents = "".join(f'<li><a href="#{_id(name)}">{titles[name]}</a></li>' for name in names)
    sections = "\n".join(_section(root, name, titles[name], groups[name]) for name in names)
    return _PAGE.format(source=_source(root), contents=f"<ul>{contents}</ul>", sections=sections)


def write_gallery(root: Path) -> Path:
    """Write :func:`gallery` to ``assets/index.html`` and return its path."""
    page, target = gallery(root), root / "assets" / "index.html"
    atomic_write(target, lambda path: path.write_text(page, "utf-8"))
    return target


def _source(root: Path) -> str:
    """Where the figures come from; of a run with one note for all, such as a quick run, that note."""
    if (root / "assets" / "RESULTS.md").is_file():
        commands = '<a href="RESULTS.md">RESULTS.md</a>'
        return f"Each figure is drawn from a record in this repository, by the commands in {commands}."
    notes = {read_json(path).get("note", "") for path in (root / "checkpoints").glob("*/record.json")}
    warning = f"<strong>{html.escape(notes.pop())}.</strong> " if len(notes) == 1 and any(notes) else ""
    return f"{warning}Figures of one run; their records lie in <code>checkpoints</code>, the tables in its notebooks."


def _id(name: str) -> str:
    return html.escape(name.replace(" ", "-"))


def _title(name: str, folder: Path) -> str:
    """The heading of a group: what an experiment began with, the name of a model, or that of a folder."""
    if name == ".":
        return "The finding"
    if (folder / SUMMARY).is_file():
        kind, _, own = name.rpartition(" ")
        summary = read_part(FoldsSummary, folder / SUMMARY, "it is made by python -m utils folds or combine")
        return f"{kind} {html.escape(describe_start(summary))} <small>({html.escape(own)})</small>"
    return html.escape(display_name(name))


def _section(root: Path, name: str, title: str, paths: list[Path]) -> str:
    record = root / "checkpoints" / name / "record.json"
    note = read_json(record).get("note", "") if record.is_file() else ""
    said = f'<p class="note">{html.escape(note)}</p>' if note else ""
    figures = "\n".join(_figure(root / "assets", path) for path in paths)
    return f'<h2 id="{_id(name)}">{title}</h2>\n{said}\n{figures}'


def _figure(assets: Path, path: Path) -> str:
    words = CAPTIONS.get(f"{path.parent.name}/{path.stem}") or CAPTIONS.get(path.stem) or path.stem.replace("_", " ")
    caption = html.escape(words)
    source = html.escape(Path(os.path.relpath(path, assets)).as_posix())
    return f'<figure><img src="{source}" alt="{caption}" loading="lazy">\n<figcaption>{caption}</figcaption></figure>'
