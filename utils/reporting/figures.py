"""The figures of a model, drawn from its record: ``python -m utils figures`` draws all of them again.

Curves and matrices need the record alone. Pictures of attacked slices and heat maps also need the
weights and the images, and are left as they are where one of the two is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from matplotlib.figure import Figure

from models.def_models import MRIClassifier
from utils.attacks.attack import Attack
from utils.core.paths import read_json
from utils.core.radii import radius_label
from utils.data.sets import DataSplits, ImageSet
from utils.data.workspace import Workspace, pick_device
from utils.evaluation.examples import adversarial_examples
from utils.experiments.records import HARDENED, display_name, load_vote, title_of
from utils.grad_cam import explain, explain_rows, right_and_wrong, with_cells
from utils.reporting.plots import (
    plot_accuracy_curve,
    plot_confusion_matrix,
    plot_loss_curve,
    plot_member_curves,
    plot_optuna_history,
    plot_optuna_importance,
    plot_optuna_pareto,
    plot_robustness_curve,
)
from utils.reporting.robustness_figures import show_all
from utils.reporting.robustness_plots import plot_heat_map, plot_step_sizes
from utils.reporting.slices import plot_adversarial_examples, plot_grad_cam
from utils.reporting.style import save_figure
from utils.training.checkpoints import WEIGHTS, load_checkpoint, read_record
from utils.training.record import ModelRecord, ObjectiveFacts, Record, VoteRecord

Study = Mapping[str, Any]


def loss_curve(record: Record) -> Figure:
    """Losses over epochs; of a vote, the validation losses of its members."""
    title = f"{_name(record)}: training"
    if isinstance(record, VoteRecord):
        title = f"{_name(record)}: training of its members"
        unit = "validation loss (cross-entropy, nats)"
        return plot_member_curves(_histories(record), "validation_loss", title=title, unit=unit, note=record.note)
    training = record.trained
    return plot_loss_curve(
        training.history,
        title=title,
        best_epoch=training.best_epoch,
        training=_trained_on(training.objective),
        note=record.note,
    )


def _trained_on(objective: ObjectiveFacts) -> str:
    """What the loss of a training is of."""
    weight = objective.adv_weight
    if not objective.hardens:
        return "clean images"
    if objective.name == "adversarial" and weight < 1:
        return f"{1 - weight:.0%} clean,\n{weight:.0%} attacked images"
    if objective.name in ("trades", "mart"):
        return f"clean and attacked,\n{objective.name.upper()}'s own loss"
    return "attacked images"


def accuracy_curve(record: Record) -> Figure:
    """Accuracies over epochs; of a vote, the robust validation accuracies of its members."""
    title = f"{_name(record)}: training"
    if isinstance(record, VoteRecord):
        title = f"{_name(record)}: training of its members"
        unit = "validation accuracy, balanced, PGD-10 (%)"
        return plot_member_curves(
            _histories(record), "validation_robust_accuracy", title=title, unit=unit, note=record.note
        )
    training = record.trained
    n = training.config.validation_images
    robust = "validation_robust_accuracy" in training.history[0]
    told = f"attacked on at most {n} validation images" if robust and n else ""
    note = "; ".join(filter(None, [told, record.note]))
    return plot_accuracy_curve(training.history, title=title, best_epoch=training.best_epoch, note=note)


def _histories(record: VoteRecord) -> dict[str, list[dict[str, float]]]:
    return {display_name(title): training.history for title, training in record.vote.training.items()}


def _name(record: Record) -> str:
    return display_name(title_of(record))


def confusion_matrix(record: Record) -> Figure:
    """Of the test images, without attack."""
    found = record.tested
    title = f"{_name(record)}: {found.n} test images, without attack"
    return plot_confusion_matrix(found.confusion, record.classes, title=title, note=record.note)


def robustness_curve(record: Record, base: Record | None = None) -> Figure:
    """Robust accuracy over radii.

    Args:
        base: record of the model before hardening, drawn beside it.
    """
    lines: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for one in (base, record) if base else (record,):
        for name, curve in one.robustness.items():
            lines[f"{_name(one)}, {name}"] = (curve.epsilons, curve.robust_accuracy)
    for name, curve in (record.vote.robustness if isinstance(record, VoteRecord) else {}).items():
        lines[display_name(name)] = (curve.epsilons, curve.robust_accuracy)
    rows = record.tested.confusion
    title = f"{_name(base)} before and after hardening" if base else f"{_name(record)} under attack"
    chance = max(map(sum, rows)) / sum(map(sum, rows))
    note = "; ".join(filter(None, [f"{sum(map(sum, rows))} test images", record.note]))
    return plot_robustness_curve(lines, title=title, chance=chance, note=note)


def step_size(record: Record) -> Figure:
    """Accuracy under PGD over its step size.

    Raises:
        ValueError: it was not measured.
    """
    title = f"{_name(record)}: accuracy under PGD by its step size"
    made, n = getattr(record, "step_size", None), record.tested.n
    if made is None:
        raise ValueError(f"the record of {_name(record)} tells nothing of step sizes")
    # records of before the number was kept are of a quarter of the test images, as their notebooks say
    n_images = made.n_images or n // 4
    told = f"the tables' numbers are of {n}" if n_images != n else ""
    return plot_step_sizes(
        made.alphas,
        made.accuracy,
        eps=made.eps,
        steps=made.steps,
        clean=made.clean,
        n_images=n_images,
        n_subjects=made.n_subjects,
        title=title,
        note="; ".join(filter(None, [told, record.note])),
    )


def transfer_matrix(record: Record) -> Figure:
    """Accuracy of each member of a vote on images that were made to fool each other one.

    Raises:
        ValueError: it was not measured.
    """
    made = getattr(record, "transfer", None)
    if made is None:
        raise ValueError(f"the record of {_name(record)} tells nothing of transfer")
    title = f"{_name(record)}: {made.attack} carried from member to member, eps {radius_label(made.eps)}"
    accuracy = {
        display_name(source): {display_name(target): value for target, value in row.items()}
        for source, row in made.accuracy.items()
    }
    n = made.n_images or (record.worst_case.curve.n_images if record.worst_case else None)
    told = f"{n} of {record.tested.n} test images" if n else ""
    note = "; ".join(filter(None, [told, record.note]))
    return plot_heat_map(accuracy, title=title, rows="made to fool", columns="shown to", note=note)


#: Figures that a record alone suffices for, by file name.
FROM_RECORD: dict[str, Callable[..., Figure]] = {
    "loss_curve": loss_curve,
    "accuracy_curve": accuracy_curve,
    "confusion_matrix": confusion_matrix,
    "robustness_curve": robustness_curve,
    "step_size": step_size,
    "transfer_matrix": transfer_matrix,
}
#: What a record must hold for some of them.
_NEEDS = {"robustness_curve": "robustness", "step_size": "step_size", "transfer_matrix": "transfer"}


#: Of so many finished trials on, importances of hyperparameters are drawn.
FEWEST_TRIALS = 10


def optuna_figures(study: Study, title: str, note: str = "") -> dict[str, Figure]:
    """History and importance of a search, from the file that it wrote; nothing for what the file does not tell.

    Importance takes ``FEWEST_TRIALS`` finished trials: of fewer it says nothing.
    """
    figures, title = {}, display_name(title)
    finished = [trial for trial in study.get("history", []) if trial["state"] == "complete"]
    if study.get("history"):
        unit = study["selected_by"].replace("_", " ")
        figures["optuna_history"] = plot_optuna_history(
            study["history"], title=f"{title}: Optuna search", unit=unit, note=note
        )
    if study.get("importance") and len(finished) >= FEWEST_TRIALS:
        figures["optuna_importance"] = plot_optuna_importance(
            study["importance"], title=f"{title}: what mattered in the search", note=note
        )
    hardened = [trial for trial in study.get("history", []) if "robust" in trial]
    if hardened:
        attack = f"worst case at {radius_label(study['objective']['eps'])}"
        facts = {"chosen": study["chosen"], "floor": study["clean_floor"], "attack": attack}
        figures["optuna_pareto"] = plot_optuna_pareto(
            hardened, **facts, title=f"{title}: with and without attack", note=note
        )
    return figures


def show(record: Record, name: str, folder: Path, *, base: Record | None = None) -> Figure:
    """Draw one of ``FROM_RECORD``, save it in ``folder``, and return it.

    Args:
        base: for ``robustness_curve``, the record before hardening.
    """
    figure = FROM_RECORD[name](record, base) if base else FROM_RECORD[name](record)
    save_figure(figure, folder / f"{name}.png")
    return figure


def show_search(path: Path, title: str, folder: Path, *, note: str = "") -> list[Figure]:
    """Draw the figures of a search, save them in ``folder``, and return them."""
    return show_all(optuna_figures(read_json(path), title, note), folder)


def recipe(
    attacks: Sequence[tuple[Attack, float]], values: Sequence[float] = (), parameter_type: str = "Epsilon"
) -> dict[str, Any]:
    """How a picture of attacked slices was made, as plain values for a record."""
    budgets = [[attack.settings(), eps] for attack, eps in attacks]
    return {"values": list(values), "parameter_type": parameter_type, "attacks": budgets}


def pictures(record: Record, model: torch.nn.Module, test: ImageSet, cams: list[tuple]) -> dict[str, Figure]:
    """Attacked examples as the record says that they were made, and heat maps of ``cams`` where there are any."""
    device = pick_device()
    figures = {}
    rule = f", {record.vote.rule} vote" if isinstance(record, VoteRecord) else ""
    for kind, made in record.examples.items():
        attacks = [(Attack.from_dict(budget), eps) for budget, eps in made.attacks]
        examples = adversarial_examples(model.to(device), test, attacks=attacks, device=device)
        figures[f"adversarial_examples_{kind}"] = plot_adversarial_examples(
            made.values,
            examples,
            kind,
            made.parameter_type,
            classes=record.classes,
            model=f"{_name(record)}{rule}",
            note=record.note,
        )
    if cams:
        title = f"{_name(record)}: Grad-CAM of the model's own answer"
        figures["grad_cam"] = plot_grad_cam(cams, title=title, note=record.note)
    return figures


def hardening_cams(
    clean: MRIClassifier, hardened: MRIClassifier, test: ImageSet, attack: tuple[Attack, float], device: Any = "cpu"
) -> list[tuple]:
    """Heat maps on the same slices: the clean model's without and under attack, the hardened model's under attack."""
    right, _ = right_and_wrong([clean], test, device=device)
    attacked = f"{attack[0].title},\n{radius_label(attack[1])}"

    def row(model: MRIClassifier, words: str, by: tuple[Attack, float] | None) -> tuple:
        return explain(model, test, right, name=with_cells(words, model, test), device=device, attack=by)

    return [
        row(clean, "not hardened,\nno attack", None),
        row(clean, f"not hardened,\n{attacked}", attack),
        row(hardened, f"hardened,\n{attacked}", attack),
    ]


def member_cams(members: Mapping[str, MRIClassifier], test: ImageSet, device: Any = "cpu") -> list[tuple]:
    """One row of heat maps a member, all on the same slices, that all members get right where there are such."""
    right, _ = right_and_wrong(list(members.values()), test, device=device)
    named = {display_name(name).replace(", ", ",\n"): member for name, member in members.items()}
    return [
        explain(member, test, right, name=with_cells(name, member, test), device=device)
        for name, member in named.items()
    ]


def redraw(workspace: Workspace, title: str, splits: DataSplits | None) -> list[Path]:
    """Draw every figure of one model again that its record, and weights and images where there are, allow.

    Args:
        title: folder in ``checkpoints/`` and ``assets/``.
        splits: the prepared images; None draws from the record alone.

    Raises:
        FileNotFoundError, ValueError: the record is missing or damaged, or the images are not those of the record.
    """
    record = read_record(workspace.checkpoint(title))
    base = None
    if title.endswith(HARDENED):
        base = read_record(workspace.checkpoint(title.removesuffix(HARDENED)))
    figures = {}
    for name, draw in FROM_RECORD.items():
        if name in _NEEDS and not getattr(record, _NEEDS[name], None):
            continue
        figures[name] = draw(record, base) if name == "robustness_curve" else draw(record)
    study = workspace.hyperparams(title)
    if study.is_file():
        figures |= optuna_figures(read_json(study), title, record.note)
    if splits:
        figures |= _pictures(workspace, title, record, splits)
    return [save_figure(figure, workspace.assets(title) / f"{name}.png") for name, figure in figures.items()]


def _pictures(workspace: Workspace, title: str, record: Record, splits: DataSplits) -> dict[str, Figure]:
    classes, fingerprint = splits.classes, splits.fingerprint
    test = splits.test.balanced_subset(record.tested.n)
    device = pick_device()
    if isinstance(record, VoteRecord):
        vote = load_vote(workspace, record, classes=classes, fingerprint=fingerprint).to(device)
        members = dict(zip(record.vote.members, cast(list[MRIClassifier], list(vote.members))))
        return pictures(record, vote, test, member_cams(members, test, device))
    if not (workspace.checkpoint(title) / WEIGHTS).is_file():
        return {}
    model, _ = load_checkpoint(workspace.checkpoint(title), classes=classes, fingerprint=fingerprint)
    model.to(device)
    if not title.endswith(HARDENED):
        return pictures(record, model, test, explain_rows(model, test, n=5, device=device))
    plain = workspace.checkpoint(title.removesuffix(HARDENED))
    if not (plain / WEIGHTS).is_file() or not isinstance(record, ModelRecord) or not record.grad_cam_attack:
        return pictures(record, model, test, [])
    clean, _ = load_checkpoint(plain, classes=classes, fingerprint=fingerprint)
    budget, eps = record.grad_cam_attack
    cams = hardening_cams(clean.to(device), model, test, (Attack.from_dict(budget), eps), device)
    return pictures(record, model, test, cams)
