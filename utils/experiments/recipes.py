"""Which way of hardening holds best on unknown patients, over several seeds, chosen by validation patients alone.

    python -m utils recipes --data dataset/dataset_variables --image-size 32 --seeds 0 1 2 --out FOLDER

For each seed a clean model is trained, and each variant hardens it. Every run leaves a small JSON file in FOLDER and is
not done again; several processes may work on different seeds or variants of one FOLDER. ``summary.json`` and
``summary.png`` are made from these files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from models.def_models import BACKBONES, MRIClassifier, build_model
from utils.attacks.attack import describe
from utils.attacks.suites import SUITES, check_suite
from utils.core.paths import need, read_json, write_json
from utils.core.reproducibility import environment_facts, seed_everything
from utils.data.sets import DataSplits, ImageSet
from utils.data.workspace import pick_device
from utils.evaluation.baselines import baseline_answers
from utils.evaluation.intervals import report
from utils.evaluation.worst_case import robustness_curve
from utils.experiments.records import save_trained
from utils.experiments.specification import differing, read_part, refuse_other, start_facts
from utils.training.augment import Augmentation
from utils.training.checkpoints import is_trained, load_checkpoint, load_trainable
from utils.training.config import TrainConfig
from utils.training.loop import print_epoch, train
from utils.training.objectives import Standard, make_objective

SUITE = "brief"
EPSILONS = (1 / 255, 2 / 255)
_KEPT = ("n", "accuracy", "balanced_accuracy", "macro_f1", "auroc")
SUMMARY = "summary.json"
_ANOTHER = "give an --out of another name"


@dataclass(frozen=True)
class Variant:
    """One way to harden.

    Attributes:
        title: for tables.
        recipe: a key of :data:`utils.training.objectives.RECIPES`.
        objective, config, augmentation: what differs from the defaults.
        freeze_batchnorm: keep the clean model's BatchNorm.
    """

    title: str
    recipe: str = "adversarial"
    objective: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    augmentation: Mapping[str, Any] = field(default_factory=dict)
    freeze_batchnorm: bool = False


_FULL = {"adv_weight": 1.0}
#: The recipes, each with its authors' weight of the second term.
RECIPE_VARIANTS = {
    "adversarial": Variant("adversarial, half clean", objective={"adv_weight": 0.5}),
    "adversarial_full": Variant("adversarial, all attacked", objective=_FULL),
    "trades": Variant("TRADES", "trades"),
    "mart": Variant("MART", "mart"),
    "n_fgsm": Variant("N-FGSM", "n_fgsm"),
}
#: One change at a time to ``adversarial_full``.
CHANGE_VARIANTS = {
    "curriculum": Variant("+ curriculum", objective=_FULL | {"curriculum": 0.5}),
    "ema": Variant("+ averaged weights", objective=_FULL, config={"ema_decay": 0.99}),
    "awp": Variant("+ weight perturbation", objective=_FULL, config={"awp": 0.005}),
    "label_smoothing": Variant("+ label smoothing", objective=_FULL, config={"label_smoothing": 0.1}),
    "frozen_batchnorm": Variant("+ frozen BatchNorm", objective=_FULL, freeze_batchnorm=True),
    "layer_decay": Variant("+ layer-wise rates", objective=_FULL, config={"layer_decay": 0.7}),
    "class_sampling": Variant("+ classes drawn alike", objective=_FULL, config={"sampling": "class"}),
    "patient_batches": Variant("+ patients spread", objective=_FULL, config={"sampling": "patient"}),
    "mixup": Variant("+ mixup", objective=_FULL, config={"mixup": 0.2}),
    "cutmix": Variant("+ CutMix", objective=_FULL, config={"cutmix": 1.0}),
    "scanner": Variant("+ scanner changes", objective=_FULL, augmentation={"scanner": 0.3}),
    "weight_decay": Variant("+ weight decay x 4", objective=_FULL, config={"weight_decay": 0.2}),
}
VARIANTS = RECIPE_VARIANTS | CHANGE_VARIANTS
CLEAN = "clean"
#: Files of encoders, and what they are called wherever their results are shown.
ENCODERS = {"dinov2_vits14_dav2s_fp16.safetensors": "DINOv2-S (Depth-Anything-V2)"}


@dataclass(frozen=True)
class Budget:
    """How much is spent on each run; the same for all variants.

    Attributes:
        clean_epochs, clean_rate: of the clean model; ``epochs`` and ``rate`` are of hardening.
        train_steps, eps: PGD steps and radius of hardening.
        validation_images: at most so many are attacked after each epoch.
        max_images: at most so many test and so many validation images are attacked in the end, spread over patients.
        weights, trainable: of the clean model, see :func:`models.def_models.build_model`; hardening trains the same
            blocks.
        slices_per_patient, label_smoothing: of both trainings, see :class:`utils.training.config.TrainConfig`.
        suite: key of :data:`utils.attacks.suites.SUITES`, whose worst case is reported.
        precision: see :class:`utils.training.config.TrainConfig`; attacks that score a model compute in float32.
    """

    image_size: int = 32
    clean_epochs: int = 14
    epochs: int = 8
    train_steps: int = 2
    eps: float = 2 / 255
    batch_size: int = 64
    clean_rate: float = 1e-3
    rate: float = 5e-4
    validation_images: int = 512
    max_images: int = 640
    weights: str = "scratch"
    trainable: str | int = "all"
    slices_per_patient: int = 0
    label_smoothing: float = 0.0
    suite: str = SUITE
    precision: str = "auto"

    def __post_init__(self) -> None:
        check_suite(self.suite)


def run_seed(
    splits: DataSplits,
    *,
    backbone: str,
    variants: Sequence[str],
    seed: int,
    budget: Budget,
    out: Path,
    work: Path,
) -> None:
    """Train and score the clean model and each variant of one seed, as far as that is not done yet.

    Args:
        variants: keys of ``VARIANTS``.
        out: folder of the JSON files.
        work: folder of weights and unfinished runs.
    """
    wanted = specification(splits, backbone, budget)
    for path in sorted(out.glob("*_seed*.json")):
        refuse_other(path, _facts_of(read_run(path)), wanted, _ANOTHER)
    claim(work, wanted)
    clean_folder = work / f"{CLEAN}_seed{seed}"
    if not is_trained(clean_folder):
        train_clean(splits, backbone, seed, budget, clean_folder)
    for name in (CLEAN, *variants):
        target = out / f"{name}_seed{seed}.json"
        if target.is_file():
            refuse_other(target, read_run(target), {"variant": name, "seed": seed}, "delete it, and it is made again")
            continue
        print(f"{name}, seed {seed}", flush=True)
        folder = work / f"{name}_seed{seed}"
        if not is_trained(folder):
            harden(splits, VARIANTS[name], seed, budget, clean_folder, folder)
        model, record = load_checkpoint(folder, classes=splits.classes, fingerprint=splits.fingerprint)
        need(
            record, ("training.history",), folder / "record.json", "delete this folder, and the model is trained again"
        )
        write_json(target, _score_run(name, seed, model, record, splits, budget) | {"specification": wanted})


def specification(splits: DataSplits, backbone: str, budget: Budget) -> dict[str, Any]:
    """Everything that a run's result depends on, beside its variant and its seed, as plain values.

    Raises:
        FileNotFoundError: the budget's weights do not exist.
    """
    measured = {"epsilons": [0.0, *EPSILONS], "attacks": [attack["title"] for attack in describe(SUITES[budget.suite])]}
    data = {"backbone": backbone, "fingerprint": splits.fingerprint}
    return asdict(budget) | start_facts(budget.weights) | data | measured


#: What every run's file holds.
_RUN = ("variant", "title", "seed", "model.backbone", "training.history", "training.seconds", "budget")
_RUN += ("data.fingerprint", "validation.metrics", "test.metrics", "test.attacks", "test.n_images")


def read_run(path: Path) -> dict[str, Any]:
    """The file of one run.

    Raises:
        ValueError: it is not whole; the message names it.
    """
    return read_part(path, _RUN)


def _facts_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """The :func:`specification` of a stored run, as far as older files tell it."""
    told = {"backbone": run["model"]["backbone"], "fingerprint": run["data"]["fingerprint"]}
    told |= {name: run["test"][name] for name in ("epsilons", "attacks")}
    return {**run["budget"], **told, **run.get("specification", {})}


def claim(work: Path, wanted: Mapping[str, Any]) -> None:
    """Mark a folder of weights and unfinished runs as made with a :func:`specification`.

    Raises:
        ValueError: it was made with another.
    """
    # how much is scored in the end, and by what, changes no weights
    scoring = ("max_images", "epsilons", "attacks", "suite")
    settings = {name: value for name, value in wanted.items() if name not in scoring}
    path = work / "settings.json"
    stored = read_json(path) if path.is_file() else settings
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds no settings; {_ANOTHER}")
    if "weights_sha256" not in stored and "weights" in stored:
        stored = stored | {"weights": weights_name(str(stored["weights"]))}
    refuse_other(work, stored, settings, _ANOTHER)
    write_json(path, settings)


def train_clean(splits: DataSplits, backbone: str, seed: int, budget: Budget, folder: Path) -> None:
    """Train without attack and save in ``folder``; an interrupted training goes on."""
    seed_everything(seed)
    model = build_model(
        backbone,
        num_classes=len(splits.classes),
        image_size=budget.image_size,
        weights=budget.weights,
        trainable=budget.trainable,
        classes=splits.classes,
    )
    config = TrainConfig(
        num_epochs=budget.clean_epochs,
        batch_size=budget.batch_size,
        learning_rate=budget.clean_rate,
        label_smoothing=budget.label_smoothing,
        slices_per_patient=budget.slices_per_patient,
        precision=budget.precision,
        seed=seed,
    )
    _train(model, splits, config, Standard(), folder, weights_name(budget.weights))


def harden(splits: DataSplits, variant: Variant, seed: int, budget: Budget, start: Path, folder: Path) -> None:
    """Harden the model in ``start`` and save it in ``folder``; an interrupted training goes on."""
    seed_everything(seed)
    model = load_trainable(start, trainable=budget.trainable, classes=splits.classes, fingerprint=splits.fingerprint)
    if variant.freeze_batchnorm:
        model.freeze_batchnorm()
    config = TrainConfig(
        num_epochs=budget.epochs,
        batch_size=budget.batch_size,
        learning_rate=budget.rate,
        label_smoothing=budget.label_smoothing,
        slices_per_patient=budget.slices_per_patient,
        validation_images=budget.validation_images,
        augmentation=replace(Augmentation(), **variant.augmentation),
        precision=budget.precision,
        seed=seed,
    )
    objective = make_objective(variant.recipe, **{"eps": budget.eps, "steps": budget.train_steps} | variant.objective)
    _train(model, splits, replace(config, **variant.config), objective, folder, start.name)


def _train(
    model: MRIClassifier, splits: DataSplits, config: TrainConfig, objective: Standard, folder: Path, start: str
) -> None:
    run = {"config": config, "objective": objective}
    result = train(model, splits, folder=folder, on_epoch=print_epoch, **run)
    save_trained(model, folder, splits=splits, result=result, start=start, **run)


def weights_name(weights: str) -> str:
    """Weights without the place where they lie."""
    return Path(weights).name


def _score_run(
    name: str, seed: int, model: MRIClassifier, record: Mapping[str, Any], splits: DataSplits, budget: Budget
) -> dict[str, Any]:
    return {
        "variant": name,
        "title": VARIANTS[name].title if name in VARIANTS else "not hardened",
        "seed": seed,
        "model": record["model"],
        "training": record["training"],
        "budget": asdict(budget) | {"weights": weights_name(budget.weights)},
        "validation": _attacked(model, splits.validation, EPSILONS[-1:], seed, budget),
        "test": _attacked(model, splits.test, EPSILONS, seed, budget),
        "data": splits.info,
        "environment": environment_facts(),
    }


def _attacked(
    model: MRIClassifier, side: ImageSet, epsilons: Sequence[float], seed: int, budget: Budget
) -> dict[str, Any]:
    """Metrics of some images without attack and under the worst case of the budget's suite at each radius."""
    device, attacks = pick_device(), SUITES[budget.suite]
    images = side.balanced_subset(budget.max_images)
    curve = robustness_curve(model.to(device), images, attack=attacks, epsilons=epsilons, seed=seed, device=device)
    return {
        "epsilons": curve.epsilons,
        "attacks": [attack["title"] for attack in describe(attacks)],
        "n_images": curve.n_images,
        "n_subjects": curve.n_subjects,
        "metrics": [_short(logits, images) for logits in curve.logits],
    }


def _short(logits: torch.Tensor, images: ImageSet) -> dict[str, Any]:
    found = report(logits, images)
    return {
        question: {level: {key: own[key] for key in _KEPT} if own else None for level, own in levels.items()}
        for question, levels in found.items()
    }


def score_baselines(splits: DataSplits) -> dict[str, dict[str, Any]]:
    """Name -> metrics of each baseline on all test images."""
    return {name: _short(logits, splits.test) for name, logits in baseline_answers(splits).items()}


#: Column -> where its value is in a run's file: side, radius (index), question, level, metric.
COLUMNS: dict[str, tuple[str, int, str, str, str]] = {
    "validation balanced, 2/255": ("validation", 1, "4 classes", "image", "balanced_accuracy"),
    "clean": ("test", 0, "4 classes", "image", "accuracy"),
    "1/255": ("test", 1, "4 classes", "image", "accuracy"),
    "2/255": ("test", 2, "4 classes", "image", "accuracy"),
    "clean, balanced": ("test", 0, "4 classes", "image", "balanced_accuracy"),
    "2/255, balanced": ("test", 2, "4 classes", "image", "balanced_accuracy"),
    "patient AUROC, clean": ("test", 0, "binary", "patient", "auroc"),
    "patient AUROC, 1/255": ("test", 1, "binary", "patient", "auroc"),
}
CHOSEN_BY = next(iter(COLUMNS))


def summarise(out: Path, baselines: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Mean and standard deviation over seeds of each variant whose runs lie in ``out``, and the winner.

    Args:
        baselines: of :func:`score_baselines`; None takes those of the last summary.

    Raises:
        FileNotFoundError: no runs there.
        ValueError: runs over other data, models or budgets among them, or one that is not whole.
    """
    runs = [read_run(path) for path in sorted(out.glob("*_seed*.json"))]
    if not runs:
        raise FileNotFoundError(f"no finished runs in {out}")
    same = [{"budget": run["budget"], "model": run["model"], **_facts_of(run)} for run in runs]
    other = [name for one in same[1:] for name in differing(same[0], one)]
    if other:
        raise ValueError(f"{out} holds runs with other {', '.join(dict.fromkeys(other))}; use a folder for each")
    old = {}
    if baselines is None and (out / SUMMARY).is_file():
        old = read_part(out / SUMMARY, ("baselines",))["baselines"]
    order = [CLEAN, *VARIANTS]
    rows = {}
    for name in sorted({run["variant"] for run in runs}, key=order.index):
        own = [run for run in runs if run["variant"] == name]
        rows[name] = {
            "title": own[0]["title"],
            "seeds": [run["seed"] for run in own],
            "minutes": float(np.mean([run["training"]["seconds"] for run in own])) / 60,
            "collapsed": sum(any(entry.get("collapsed") for entry in run["training"]["history"]) for run in own),
            "values": {column: [_value(run, *place) for run in own] for column, place in COLUMNS.items()},
        }
    hardened = {name: np.mean(row["values"][CHOSEN_BY]) for name, row in rows.items() if name != CLEAN}
    first = runs[0]
    return {
        "winner": max(hardened, key=hardened.__getitem__) if hardened else None,
        "chosen_by": CHOSEN_BY,
        "variants": rows,
        "baselines": dict(baselines) if baselines is not None else old,
        "attacks": first["test"]["attacks"],
        "n_images": first["test"]["n_images"],
        "n_subjects": first["test"]["n_subjects"],
        "model": first["model"],
        "budget": first["budget"],
        "data": first["data"],
        "environment": environment_facts(),
    }


def _value(run: Mapping[str, Any], side: str, step: int, question: str, level: str, metric: str) -> float | None:
    found = run[side]["metrics"][step].get(question, {}).get(level)
    return found[metric] if found else None


def summary_table(summary: Mapping[str, Any]) -> pd.DataFrame:
    """Mean ± standard deviation over seeds in percent, a row a variant, the baselines below; the winner has a star."""
    rows = {}
    for name, row in summary["variants"].items():
        cells = {column: _mean_and_sd(values) for column, values in row["values"].items()}
        title = row["title"] + (" *" if name == summary["winner"] else "")
        rows[title] = {"seeds": str(len(row["seeds"])), **cells, "minutes": f"{row['minutes']:.1f}"}
    for name, metrics in summary["baselines"].items():
        found = {"test": {"metrics": [metrics]}}
        places = {column: place for column, place in COLUMNS.items() if place[:2] == ("test", 0)}
        rows[name] = {column: _mean_and_sd([_value(found, *place)]) for column, place in places.items()}
    return pd.DataFrame.from_dict(rows, orient="index").astype(object).fillna("-")


def _mean_and_sd(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    return f"{np.mean(known):.1f}" + (f" ± {np.std(known, ddof=1):.1f}" if len(known) > 1 else "")


def describe_start(summary: Mapping[str, Any]) -> str:
    """Backbone, size and, where they were not drawn at random, the weights that the training began with."""
    weights = summary["budget"]["weights"]
    model = f"{BACKBONES[summary['model']['backbone']].title}, {summary['model']['image_size']} px"
    return model + ("" if weights == "scratch" else f", from {ENCODERS.get(weights, weights)}")
