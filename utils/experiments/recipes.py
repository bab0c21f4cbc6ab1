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
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from models.def_models import MRIClassifier
from utils.attacks.attack import describe
from utils.attacks.suites import SUITES
from utils.core.parts import read_part
from utils.core.paths import read_json, write_json
from utils.core.reproducibility import environment_facts
from utils.data.sets import DataFacts, DataSplits, ImageSet
from utils.data.workspace import pick_device
from utils.evaluation.baselines import baseline_answers
from utils.evaluation.intervals import report
from utils.evaluation.metrics import Levels, Metrics, Scores
from utils.evaluation.worst_case import robustness_curve
from utils.experiments.budget import Budget, weights_name
from utils.experiments.protocol import model_to_harden, new_model, train_and_save
from utils.experiments.recipe_records import RecipesSummary, RunRecord, Side, TrainingTold, VariantRow
from utils.experiments.specification import differing, refuse_other, start_facts
from utils.training.augment import Augmentation
from utils.training.checkpoints import is_trained, load_checkpoint
from utils.training.config import TrainConfig
from utils.training.objectives import Standard, make_objective
from utils.training.record import ModelRecord

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
#: What single-step training needs where it starts from published weights; not in the comparisons above.
LATER_VARIANTS = {"n_fgsm_ramp": Variant("N-FGSM after a ramp", "n_fgsm", objective={"curriculum": 0.2})}
VARIANTS = RECIPE_VARIANTS | CHANGE_VARIANTS | LATER_VARIANTS
CLEAN = "clean"


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
            run = read_run(target)
            told = {"variant": run.variant, "seed": run.seed}
            refuse_other(target, told, {"variant": name, "seed": seed}, "delete it, and it is made again")
            continue
        print(f"{name}, seed {seed}", flush=True)
        folder = work / f"{name}_seed{seed}"
        if not is_trained(folder):
            harden(splits, VARIANTS[name], seed, budget, clean_folder, folder)
        model, record = load_checkpoint(folder, classes=splits.classes, fingerprint=splits.fingerprint)
        write_json(target, _score_run(name, seed, model, record, splits, budget).plain() | {"specification": wanted})


def specification(splits: DataSplits, backbone: str, budget: Budget) -> dict[str, Any]:
    """Everything that a run's result depends on, beside its variant and its seed, as plain values.

    Raises:
        FileNotFoundError: the budget's weights do not exist.
    """
    measured = {"epsilons": [0.0, *EPSILONS], "attacks": [attack["title"] for attack in describe(SUITES[budget.suite])]}
    data = {"backbone": backbone, "fingerprint": splits.fingerprint}
    return asdict(budget) | start_facts(budget.weights) | data | measured


def read_run(path: Path) -> RunRecord:
    """The file of one run.

    Raises:
        ValueError: it is not whole; the message names it.
    """
    return read_part(RunRecord, path, "delete it, and it is made again")


def _facts_of(run: RunRecord) -> dict[str, Any]:
    """The :func:`specification` of a stored run, as far as older files tell it."""
    told = {"backbone": run.model["backbone"], "fingerprint": run.data.fingerprint}
    told |= {"epsilons": run.test.epsilons, "attacks": run.test.attacks}
    return {**asdict(run.budget), **told, **run.specification}


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


def start_of(splits: DataSplits, backbone: str, seed: int, budget: Budget) -> MRIClassifier:
    """What a training of this budget begins from."""
    return new_model(
        splits,
        backbone,
        image_size=budget.image_size,
        weights=budget.weights,
        trainable=budget.trainable,
        seed=seed,
    )


def train_clean(splits: DataSplits, backbone: str, seed: int, budget: Budget, folder: Path) -> None:
    """Train without attack and save in ``folder``; an interrupted training goes on."""
    model = start_of(splits, backbone, seed, budget)
    config = TrainConfig(
        num_epochs=budget.clean_epochs,
        batch_size=budget.batch_size,
        learning_rate=budget.clean_rate,
        label_smoothing=budget.label_smoothing,
        keep=budget.keep,
        fit_head=budget.fit_head,
        slices_per_patient=budget.slices_per_patient,
        precision=budget.precision,
        seed=seed,
    )
    start = weights_name(budget.weights)
    train_and_save(model, splits, folder, config=config, objective=Standard(), start=start)


def harden(splits: DataSplits, variant: Variant, seed: int, budget: Budget, start: Path, folder: Path) -> None:
    """Harden the model in ``start`` and save it in ``folder``; an interrupted training goes on."""
    model = model_to_harden(splits, start, trainable=budget.trainable, seed=seed)
    if variant.freeze_batchnorm:
        model.freeze_batchnorm()
    config = TrainConfig(
        num_epochs=budget.epochs,
        batch_size=budget.batch_size,
        learning_rate=budget.rate,
        label_smoothing=budget.label_smoothing,
        keep=budget.keep,
        slices_per_patient=budget.slices_per_patient,
        validation_images=budget.validation_images,
        augmentation=replace(Augmentation(), **variant.augmentation),
        precision=budget.precision,
        seed=seed,
    )
    objective = make_objective(variant.recipe, **{"eps": budget.eps, "steps": budget.train_steps, **variant.objective})
    config = replace(config, **variant.config)
    train_and_save(model, splits, folder, config=config, objective=objective, start=start.name)


def _score_run(
    name: str, seed: int, model: MRIClassifier, record: ModelRecord, splits: DataSplits, budget: Budget
) -> RunRecord:
    return RunRecord(
        variant=name,
        title=VARIANTS[name].title if name in VARIANTS else "not hardened",
        seed=seed,
        model=record.model.plain(),
        training=TrainingTold(**record.trained.plain()),
        budget=replace(budget, weights=weights_name(budget.weights)),
        validation=_attacked(model, splits.validation, EPSILONS[-1:], seed, budget),
        test=_attacked(model, splits.test, EPSILONS, seed, budget),
        data=DataFacts(**splits.info),
        environment=environment_facts(),
    )


def _attacked(model: MRIClassifier, side: ImageSet, epsilons: Sequence[float], seed: int, budget: Budget) -> Side:
    """Metrics of some images without attack and under the worst case of the budget's suite at each radius."""
    device, attacks = pick_device(), SUITES[budget.suite]
    images = side.balanced_subset(budget.max_images)
    curve = robustness_curve(model.to(device), images, attack=attacks, epsilons=epsilons, seed=seed, device=device)
    return Side(
        epsilons=curve.epsilons,
        attacks=[attack.title for attack in attacks],
        n_images=curve.n_images,
        n_subjects=curve.n_subjects,
        metrics=[_short(logits, images) for logits in curve.logits],
    )


def _short(logits: torch.Tensor, images: ImageSet) -> Metrics:
    """A report without recalls, counts and intervals."""
    return {
        question: Levels(image=_kept(levels.image), patient=_kept(levels.patient))
        for question, levels in report(logits, images).items()
    }


def _kept(found: Scores | None) -> Scores | None:
    return Scores.model_validate({key: getattr(found, key) for key in _KEPT}) if found else None


def score_baselines(splits: DataSplits) -> dict[str, Metrics]:
    """Name -> metrics of each baseline on all test images."""
    return {name: _short(logits, splits.test) for name, logits in baseline_answers(splits).items()}


class Place(NamedTuple):
    """Where a value is in a run's file; ``step`` is the index of the radius."""

    side: str
    step: int
    question: str
    level: str
    metric: str

    def value(self, metrics: Sequence[Metrics]) -> float | None:
        """The value; None where it was not measured or is undefined."""
        asked = metrics[self.step].get(self.question)
        found = asked.of(self.level) if asked else None
        return getattr(found, self.metric) if found else None


COLUMNS: dict[str, Place] = {
    "validation balanced, 2/255": Place("validation", 1, "4 classes", "image", "balanced_accuracy"),
    "clean": Place("test", 0, "4 classes", "image", "accuracy"),
    "1/255": Place("test", 1, "4 classes", "image", "accuracy"),
    "2/255": Place("test", 2, "4 classes", "image", "accuracy"),
    "clean, balanced": Place("test", 0, "4 classes", "image", "balanced_accuracy"),
    "2/255, balanced": Place("test", 2, "4 classes", "image", "balanced_accuracy"),
    "patient AUROC, clean": Place("test", 0, "binary", "patient", "auroc"),
    "patient AUROC, 1/255": Place("test", 1, "binary", "patient", "auroc"),
}
CHOSEN_BY = next(iter(COLUMNS))


def summarise(out: Path, baselines: Mapping[str, Metrics] | None = None) -> RecipesSummary:
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
    same = [{"budget": asdict(run.budget), "model": run.model, **_facts_of(run)} for run in runs]
    other = [name for one in same[1:] for name in differing(same[0], one)]
    if other:
        raise ValueError(f"{out} holds runs with other {', '.join(dict.fromkeys(other))}; use a folder for each")
    old: Mapping[str, Metrics] = {}
    if baselines is None and (out / SUMMARY).is_file():
        old = read_part(RecipesSummary, out / SUMMARY, "delete it, and it is made again").baselines
    order = [CLEAN, *VARIANTS]
    rows = {}
    for name in sorted({run.variant for run in runs}, key=order.index):
        own = [run for run in runs if run.variant == name]
        rows[name] = VariantRow(
            title=own[0].title,
            seeds=[run.seed for run in own],
            minutes=float(np.mean([run.training.seconds for run in own])) / 60,
            collapsed=sum(any(entry.get("collapsed") for entry in run.training.history) for run in own),
            values={
                column: [
                    place.value((run.validation if place.side == "validation" else run.test).metrics) for run in own
                ]
                for column, place in COLUMNS.items()
            },
        )
    hardened = {name: float(np.mean(_known(row.values[CHOSEN_BY]))) for name, row in rows.items() if name != CLEAN}
    first = runs[0]
    return RecipesSummary(
        winner=max(hardened, key=hardened.__getitem__) if hardened else None,
        chosen_by=CHOSEN_BY,
        variants=rows,
        baselines=dict(old if baselines is None else baselines),
        attacks=first.test.attacks,
        n_images=first.test.n_images,
        n_subjects=first.test.n_subjects,
        model=first.model,
        budget=first.budget,
        data=first.data,
        environment=environment_facts(),
    )


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def summary_table(summary: RecipesSummary) -> pd.DataFrame:
    """Mean ± standard deviation over seeds in percent, a row a variant, the baselines below; the winner has a star."""
    rows = {}
    for name, row in summary.variants.items():
        cells = {column: _mean_and_sd(values) for column, values in row.values.items()}
        title = row.title + (" *" if name == summary.winner else "")
        rows[title] = {"seeds": str(len(row.seeds)), **cells, "minutes": f"{row.minutes:.1f}"}
    for name, metrics in summary.baselines.items():
        places = {column: place for column, place in COLUMNS.items() if (place.side, place.step) == ("test", 0)}
        rows[name] = {column: _mean_and_sd([place.value([metrics])]) for column, place in places.items()}
    return pd.DataFrame.from_dict(rows, orient="index").astype(object).fillna("-")


def _mean_and_sd(values: Sequence[float | None]) -> str:
    known = [100 * value for value in _known(values)]
    if not known:
        return "-"
    return f"{np.mean(known):.1f}" + (f" ± {np.std(known, ddof=1):.1f}" if len(known) > 1 else "")
