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

import torch

from models.def_models import MRIClassifier, build_model
from utils.attacks.attack import describe
from utils.attacks.suites import SUITES
from utils.core.checks import LARGEST_SEED, whole
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
from utils.experiments.recipe_records import RunRecord, Side, TrainingTold
from utils.experiments.specification import refuse_other, start_facts
from utils.training.augment import Augmentation
from utils.training.checkpoints import load_checkpoint, trained_before
from utils.training.config import TrainConfig
from utils.training.objectives import Hardening, Standard, make_objective
from utils.training.record import ModelRecord

EPSILONS = (1 / 255, 2 / 255)
_KEPT = ("n", "accuracy", "balanced_accuracy", "macro_f1", "auroc")
_ANOTHER, _REMEDY = "give an --out of another name", "delete it, and it is made again"


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
        refuse_other(path, facts_of(read_run(path)), wanted, _ANOTHER)
    claim(work, wanted)
    clean_folder = work / f"{CLEAN}_seed{seed}"
    if not trained_before(clean_folder):
        train_clean(splits, backbone, seed, budget, clean_folder)
    for name in (CLEAN, *variants):
        target = out / f"{name}_seed{seed}.json"
        if target.is_file():
            continue
        print(f"{name}, seed {seed}", flush=True)
        folder = work / f"{name}_seed{seed}"
        if not trained_before(folder):
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
        ValueError: it is not whole, of no known variant, or bears the name of another run; the message names it.
    """
    run = read_part(RunRecord, path, _REMEDY)
    if run.variant not in (CLEAN, *VARIANTS):
        raise ValueError(f"{path} holds a run of {run.variant!r}, which is no variant here; take it to another folder")
    if path.name != f"{run.variant}_seed{run.seed}.json":
        held = f"the run of {run.variant}, seed {run.seed}"
        raise ValueError(f"{path} holds {held}, so it was copied or renamed; {_REMEDY}")
    return run


def facts_of(run: RunRecord) -> dict[str, Any]:
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


def check_runs(
    splits: DataSplits, backbone: str, variants: Sequence[str], seeds: Sequence[int], budget: Budget
) -> None:
    """Build of each run what it will build, so that none stops after others were trained.

    Args:
        variants: keys of ``VARIANTS``.

    Raises:
        FileNotFoundError, ValueError: a setting out of its range, or weights that cannot be had; the message names it.
    """
    whole("image_size", budget.image_size, 1)
    whole("max_images", budget.max_images, 1)
    for seed in seeds:
        whole("seed", seed, 0, LARGEST_SEED)
        clean_config(seed, budget)
        for name in variants:
            hardening(VARIANTS[name], seed, budget)
    build_model(
        backbone,
        num_classes=len(splits.classes),
        image_size=budget.image_size,
        weights=budget.weights,
        trainable=budget.trainable,
        classes=splits.classes,
    )


def clean_config(seed: int, budget: Budget) -> TrainConfig:
    """Settings of the training without attack."""
    return TrainConfig(
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


def hardening(variant: Variant, seed: int, budget: Budget) -> tuple[TrainConfig, Hardening]:
    """Settings and objective of a variant's training."""
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
    return replace(config, **variant.config), objective


def train_clean(splits: DataSplits, backbone: str, seed: int, budget: Budget, folder: Path) -> None:
    """Train without attack and save in ``folder``; an interrupted training goes on."""
    model, start = start_of(splits, backbone, seed, budget), weights_name(budget.weights)
    train_and_save(model, splits, folder, config=clean_config(seed, budget), objective=Standard(), start=start)


def harden(splits: DataSplits, variant: Variant, seed: int, budget: Budget, start: Path, folder: Path) -> None:
    """Harden the model in ``start`` and save it in ``folder``; an interrupted training goes on."""
    model = model_to_harden(splits, start, trainable=budget.trainable, seed=seed)
    if variant.freeze_batchnorm:
        model.freeze_batchnorm()
    config, objective = hardening(variant, seed, budget)
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
