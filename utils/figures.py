"""The figures of a model, drawn from its record: ``python -m utils.figures`` draws all of them again.

Curves and matrices need the record alone. Pictures of attacked slices and heat maps also need the
weights and the images, and are left as they are where one of the two is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from models.def_models import MRIClassifier
from utils.checkpoints import RECORD, WEIGHTS, load_checkpoint
from utils.data import DataSplits, ImageSet, load_splits
from utils.grad_cam import explain, explain_rows, right_and_wrong
from utils.paths import ROOT, read_json, write_json
from utils.plots import (
    plot_accuracy_curve,
    plot_adversarial_examples,
    plot_confusion_matrix,
    plot_grad_cam,
    plot_hero,
    plot_loss_curve,
    plot_member_curves,
    plot_optuna_history,
    plot_optuna_importance,
    plot_optuna_pareto,
    plot_robustness_curve,
    save_figure,
)
from utils.reproducibility import environment_facts, generator
from utils.results import HARDENED, known_titles, load_vote, title_of
from utils.robustness_figures import NOTEBOOKS, draw_all, show_all
from utils.robustness_plots import plot_heat_map, plot_step_sizes
from utils.suites import SUITES, Attack
from utils.workspace import Workspace, pick_device
from utils.worst_case import adversarial_examples, predict_batch

Record = dict[str, Any]


def loss_curve(record: Record) -> Figure:
    """Losses over epochs; of a vote, the validation losses of its members."""
    title = f"{title_of(record)}: training"
    if "vote" in record:
        unit = "validation loss (cross-entropy, nats)"
        return plot_member_curves(_histories(record), "validation_loss", title=title, unit=unit, note=record["note"])
    training = record["training"]
    return plot_loss_curve(training["history"], title=title, best_epoch=training["best_epoch"], note=record["note"])


def accuracy_curve(record: Record) -> Figure:
    """Accuracies over epochs; of a vote, the robust validation accuracies of its members."""
    title = f"{title_of(record)}: training"
    if "vote" in record:
        unit = "validation accuracy, balanced, PGD-10 (%)"
        return plot_member_curves(
            _histories(record), "validation_robust_accuracy", title=title, unit=unit, note=record["note"]
        )
    training = record["training"]
    return plot_accuracy_curve(training["history"], title=title, best_epoch=training["best_epoch"], note=record["note"])


def _histories(record: Record) -> dict[str, list[dict[str, float]]]:
    return {title: training["history"] for title, training in record["vote"]["training"].items()}


def confusion_matrix(record: Record) -> Figure:
    """Of the test images, without attack."""
    title = f"{title_of(record)}: test images"
    return plot_confusion_matrix(
        record["test"]["image"]["confusion"], record["classes"], title=title, note=record["note"]
    )


def robustness_curve(record: Record, base: Record | None = None) -> Figure:
    """Robust accuracy over radii.

    Args:
        base: record of the model before hardening, drawn beside it.
    """
    own = title_of(record)
    lines = {}
    for one in (base, record) if base else (record,):
        for name, curve in one["robustness"].items():
            lines[f"{title_of(one)}, {name}"] = (curve["epsilons"], curve["robust_accuracy"])
    for name, curve in record.get("vote", {}).get("robustness", {}).items():
        lines[name] = (curve["epsilons"], curve["robust_accuracy"])
    rows = record["test"]["image"]["confusion"]
    title = f"{title_of(base)} before and after hardening" if base else f"{own} under attack"
    chance = max(map(sum, rows)) / sum(map(sum, rows))
    return plot_robustness_curve(lines, title=title, chance=chance, note=record["note"])


def step_size(record: Record) -> Figure:
    """Accuracy under PGD over its step size."""
    title = f"{title_of(record)}: accuracy under PGD by its step size"
    return plot_step_sizes(**record["step_size"], title=title, note=record["note"])


def transfer_matrix(record: Record) -> Figure:
    """Accuracy of each member of a vote on images that were made to fool each other one."""
    made = record["transfer"]
    title = f"{title_of(record)}: {made['attack']} carried from member to member, eps {255 * made['eps']:.3g}/255"
    return plot_heat_map(made["accuracy"], title=title, rows="made to fool", columns="shown to", note=record["note"])


#: Figures that a record alone suffices for, by file name.
FROM_RECORD: dict[str, Callable[[Record], Figure]] = {
    "loss_curve": loss_curve,
    "accuracy_curve": accuracy_curve,
    "confusion_matrix": confusion_matrix,
    "robustness_curve": robustness_curve,
    "step_size": step_size,
    "transfer_matrix": transfer_matrix,
}
#: What a record must hold for some of them.
_NEEDS = {"robustness_curve": "robustness", "step_size": "step_size", "transfer_matrix": "transfer"}


def optuna_figures(study: Record, title: str, note: str = "") -> dict[str, Figure]:
    """History and importance of a search, from the file that it wrote; nothing for what the file does not tell."""
    figures = {}
    if study.get("history"):
        unit = study["selected_by"].replace("_", " ")
        figures["optuna_history"] = plot_optuna_history(
            study["history"], title=f"{title}: Optuna search", unit=unit, note=note
        )
    if study.get("importance"):
        figures["optuna_importance"] = plot_optuna_importance(
            study["importance"], title=f"{title}: what mattered in the search", note=note
        )
    hardened = [trial for trial in study.get("history", []) if "robust" in trial]
    if hardened:
        attack = f"worst case at {255 * study['objective']['eps']:.3g}/255"
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
    budgets = [[asdict(attack), eps] for attack, eps in attacks]
    return {"values": list(values), "parameter_type": parameter_type, "attacks": budgets}


def pictures(record: Record, model: torch.nn.Module, test: ImageSet, cams: list[tuple]) -> dict[str, Figure]:
    """Attacked examples as the record says that they were made, and heat maps of ``cams``."""
    device = pick_device()
    figures = {}
    for kind, made in record.get("examples", {}).items():
        attacks = [(Attack(**budget), eps) for budget, eps in made["attacks"]]
        examples = adversarial_examples(model.to(device), test, attacks=attacks, device=device)
        figures[f"adversarial_examples_{kind}"] = plot_adversarial_examples(
            made["values"], examples, kind, made["parameter_type"], classes=record["classes"], note=record["note"]
        )
    title = f"{title_of(record)}: Grad-CAM of the model's own answer"
    figures["grad_cam"] = plot_grad_cam(cams, title=title, note=record["note"])
    return figures


def hardening_cams(
    clean: MRIClassifier, hardened: MRIClassifier, test: ImageSet, attack: tuple[Attack, float], device: Any = "cpu"
) -> list[tuple]:
    """Heat maps on the same slices: the clean model's without and under attack, the hardened model's under attack."""
    right, _ = right_and_wrong([clean], test, device=device)
    return [
        explain(clean, test, right, name="clean model", device=device),
        explain(clean, test, right, name="clean model,\nattacked", device=device, attack=attack),
        explain(hardened, test, right, name="hardened,\nattacked", device=device, attack=attack),
    ]


def member_cams(members: Mapping[str, MRIClassifier], test: ImageSet, device: Any = "cpu") -> list[tuple]:
    """One row of heat maps a member, all on the same slices, that all members get right where there are such."""
    right, _ = right_and_wrong(list(members.values()), test, device=device)
    return [explain(member, test, right, name=name, device=device) for name, member in members.items()]


def hero(record: Record, model: torch.nn.Module, test: ImageSet, eps: float) -> tuple[Figure, Record]:
    """The test slice whose diagnosis PGD-20 turns most thoroughly, and the numbers that are shown beside it.

    Raises:
        ValueError: the attack turns no diagnosis at this radius.
    """
    attack, device = Attack(), pick_device()
    few = test.balanced_subset(64)
    pixels, labels = few.pixels(slice(None), device), few.labels.to(device)
    attacked = attack(model.to(device), pixels, labels, eps=eps, draws=generator("hero"))
    before, after = (predict_batch(model, images).softmax(1) for images in (pixels, attacked))
    turned = (before.argmax(1) == labels) & (after.argmax(1) != labels)
    if not turned.any():
        raise ValueError(f"{attack.title} turns no right diagnosis of {title_of(record)} at {255 * eps:.3g}/255")
    own = torch.arange(len(few), device=device)
    change = before[own, labels] - after[own, labels]
    best = int(change.masked_fill(~turned, -1).argmax())
    shown = {
        "model": {"title": title_of(record), **record["model"]},
        "training": {key: record["training"][key] for key in ("objective", "config", "start", "best_epoch")},
        "attack": {"title": attack.title, "eps": eps},
        "image": few.paths[best],
        "label": int(few.labels[best]),
        "probabilities": [before[best].tolist(), after[best].tolist()],
        "classes": record["classes"],
        "data": record["data"],
        "note": record["note"],
        "environment": environment_facts(),
    }
    figure = plot_hero(
        pixels[best].cpu(),
        attacked[best].cpu(),
        shown["probabilities"],
        record["classes"],
        label=shown["label"],
        eps=eps,
        title=f"{title_of(record)} before and after {attack.title}",
        note=record["note"],
    )
    return figure, shown


def save_hero(workspace: Workspace, title: str, splits: DataSplits, eps: float) -> list[Path]:
    """Draw :func:`hero` with a trained model; write ``assets/hero.png`` and ``assets/hero.json``."""
    folder = workspace.checkpoint(title)
    model, record = load_checkpoint(folder, classes=splits.classes, fingerprint=splits.fingerprint)
    figure, shown = hero(record, model, splits.test, eps)
    target = workspace.root / "assets" / "hero.json"
    write_json(target, shown)
    return [save_figure(figure, target.with_suffix(".png")), target]


def redraw(workspace: Workspace, title: str, splits: DataSplits | None) -> list[Path]:
    """Draw every figure of one model again that its record, and weights and images where there are, allow.

    Args:
        title: folder in ``checkpoints/`` and ``assets/``.
        splits: the prepared images; None draws from the record alone.

    Raises:
        FileNotFoundError, ValueError: the record is missing or damaged, or the images are not those of the record.
    """
    record = read_json(workspace.checkpoint(title) / RECORD)
    base = None
    if title.endswith(HARDENED):
        base = read_json(workspace.checkpoint(title.removesuffix(HARDENED)) / RECORD)
    figures = {}
    for name, draw in FROM_RECORD.items():
        if name in _NEEDS and _NEEDS[name] not in record:
            continue
        figures[name] = draw(record, base) if name == "robustness_curve" else draw(record)
    study = workspace.hyperparams(title)
    if study.is_file():
        figures |= optuna_figures(read_json(study), title, record["note"])
    if splits:
        figures |= _pictures(workspace, title, record, splits)
    return [save_figure(figure, workspace.assets(title) / f"{name}.png") for name, figure in figures.items()]


def _pictures(workspace: Workspace, title: str, record: Record, splits: DataSplits) -> dict[str, Figure]:
    fits = {"classes": splits.classes, "fingerprint": splits.fingerprint}
    test = splits.test.balanced_subset(record["test"]["image"]["n"])
    device = pick_device()
    if "vote" in record:
        model = load_vote(workspace, record, **fits).to(device)
        members = dict(zip(record["vote"]["members"], model.members))
        return pictures(record, model, test, member_cams(members, test, device))
    if not (workspace.checkpoint(title) / WEIGHTS).is_file():
        return {}
    model, _ = load_checkpoint(workspace.checkpoint(title), **fits)
    model.to(device)
    if not title.endswith(HARDENED):
        return pictures(record, model, test, explain_rows(model, test, n=5, device=device))
    clean, _ = load_checkpoint(workspace.checkpoint(title.removesuffix(HARDENED)), **fits)
    budget, eps = record["grad_cam_attack"]
    cams = hardening_cams(clean.to(device), model, test, (Attack(**budget), eps), device)
    return pictures(record, model, test, cams)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m utils.figures", description=__doc__.split(":")[0])
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="holds checkpoints/ and assets/; default: this repository"
    )
    parser.add_argument("--data", help="folder of prepared *_set.pt; without it, pictures of slices stay as they are")
    known = known_titles()
    parser.add_argument("--models", nargs="+", metavar="TITLE", help=f"default: all there are of {' '.join(known)}")
    parser.add_argument("--hero", metavar="TITLE", help="only draw assets/hero.png, with this model")
    parser.add_argument("--eps", type=float, default=1.0, help="radius for --hero in grey levels of 255 (default 1)")
    args = parser.parse_args(arguments)
    try:
        if args.hero and not args.data:
            raise ValueError("--hero needs --data, the folder of the prepared images")
        workspace = Workspace.open("" if args.root == ROOT else str(args.root), data_dir=args.data or "")
        splits = load_splits(workspace.data_dir) if args.data else None
        if args.hero:
            print(*save_hero(workspace, args.hero, splits, args.eps / 255), sep="\n")
            return 0
        titles = args.models or [title for title in known if (workspace.checkpoint(title) / RECORD).is_file()]
        if not titles:
            raise FileNotFoundError(f"no records in {workspace.root / 'checkpoints'}; run a notebook first")
        for title in titles:
            for path in redraw(workspace, title, splits):
                print(path)
        # weak suites first, so that where a figure is drawn twice the stronger one stays
        for suite in (NOTEBOOKS, *SUITES):
            for path, figure in draw_all(workspace, suite).items():
                print(save_figure(figure, path))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
