"""Train or harden one model without a notebook, in one process or in many.

    python -m utils train --backbone resnet34 --set num_epochs=20
    accelerate launch --multi_gpu --num_processes 4 -m utils train --backbone resnet34 --start checkpoints/ResNet34

Processes share each batch, so the result is that of one process with the same ``batch_size``, up to rounding and
dropout. A killed run goes on where it stopped, also where only its test is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from models.def_models import BACKBONES
from utils.core.paths import CHECKPOINTS, DATASET_VARIABLES, check_folder
from utils.core.processes import is_main, join_others, wait_for_all
from utils.data.sets import DataSplits, load_splits
from utils.data.workspace import pick_device
from utils.evaluation.metrics import evaluate, predict
from utils.experiments.protocol import model_to_harden, new_model, train_and_save
from utils.experiments.records import HARDENED, read_model_record, update_record
from utils.experiments.search_space import apply_hyperparams
from utils.experiments.specification import differing, start_facts
from utils.training.checkpoints import (
    RECORD,
    RESUME,
    belong_together,
    hold,
    load_checkpoint,
    read_record,
)
from utils.training.config import TrainConfig
from utils.training.objectives import RECIPES, Standard, make_objective
from utils.training.record import ModelRecord

#: Names of ``settings`` beside the fields of ``TrainConfig``.
_AUGMENTATION = ("augmentation_strength",)


def fit(
    backbone: str,
    data: str | Path = DATASET_VARIABLES,
    folder: str | Path | None = None,
    *,
    image_size: int = 224,
    weights: str = "scratch",
    trainable: str | int = "all",
    start: str | Path | None = None,
    recipe: str | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> ModelRecord | None:
    """Train a model, or harden the one in ``start``, and save it with its record.

    May be given to ``accelerate.notebook_launcher`` as it is.

    Args:
        backbone: key of ``BACKBONES``.
        data: folder of prepared ``*_set.pt``.
        folder: where weights and record go; None is the model's own in ``checkpoints/``.
        image_size, weights, trainable: see :func:`models.def_models.build_model`; of a hardened model only
            ``trainable`` counts.
        start: folder of a trained model that is hardened; None trains without attack.
        recipe: key of ``RECIPES``, for hardening; None is adversarial.
        settings: fields of ``TrainConfig``, ``augmentation_strength``, and fields of the recipe; ``eps`` is needed
            for hardening.
        overwrite: False refuses a folder that holds a finished model.

    Returns:
        the record; None in all processes but the first.

    Raises:
        FileExistsError: ``folder`` holds a finished model, or one of other settings.
        BlockingIOError: another process is training into ``folder``.
        OSError: ``folder`` cannot be made.
        FloatingPointError: the loss became NaN or infinite.
        ValueError: a backbone, a recipe or a setting that does not exist or does not fit, or a recipe without
            ``start``.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"backbone {backbone!r} is not one of {', '.join(BACKBONES)}; see models/def_models.py")
    join_others()
    settings = dict(settings or {})
    folder = Path(folder) if folder else folder_of(backbone, hardened=start is not None)
    check_folder(folder)
    objective = _objective(_recipe_of(recipe, start), settings)
    config = apply_hyperparams(TrainConfig(), settings)
    if (folder / RECORD).is_file() and not overwrite:
        _refuse_finished(folder)
    splits = load_splits(data)
    with hold(folder):
        run = {"config": config.as_dict(), "objective": objective.as_dict()}
        specification = _specification(splits, backbone, image_size, weights, trainable, start)
        if not _only_test_is_missing(folder, {**run, **specification}, overwrite):
            seed = config.seed
            if start:
                model = model_to_harden(splits, start, trainable=trainable, seed=seed, backbone=backbone)
            else:
                model = new_model(
                    splits, backbone, image_size=image_size, weights=weights, trainable=trainable, seed=seed
                )
            train_and_save(
                model,
                splits,
                folder,
                config=config,
                objective=objective,
                start=Path(start or weights).name,
                specification=specification,
            )
        model, _ = load_checkpoint(folder, classes=splits.classes, fingerprint=splits.fingerprint)
        device = pick_device()
        metrics = evaluate(predict(model.to(device), splits.test, device=device), splits.test)
        if is_main():
            update_record(folder, test=metrics)
        wait_for_all()
    return read_model_record(folder) if is_main() else None


def folder_of(backbone: str, *, hardened: bool) -> Path:
    """Where a model lies unless another folder is asked for."""
    return CHECKPOINTS / (BACKBONES[backbone].title + (HARDENED if hardened else ""))


def _refuse_finished(folder: Path) -> None:
    """Raise FileExistsError where a folder holds a model that is trained and tested, or that is not whole."""
    if read_record(folder).test and belong_together(folder):
        raise FileExistsError(f"{folder} holds a finished model; name another folder, or replace it with --overwrite")
    if not belong_together(folder) and not (folder / RESUME).is_file():
        raise FileExistsError(
            f"{folder} holds weights that are not those of its record, and no unfinished training; name another "
            "folder, or replace them with --overwrite"
        )


def _specification(
    splits: DataSplits, backbone: str, image_size: int, weights: str, trainable: str | int, start: str | Path | None
) -> dict[str, Any]:
    """By what a run is known again, beside its settings and its recipe."""
    # a hardened model keeps the size of its start
    shape = {} if start else {"image_size": image_size}
    known = {"backbone": backbone, "fingerprint": splits.fingerprint, "trainable": trainable}
    return known | shape | start_facts(start or weights)


def _only_test_is_missing(folder: Path, wanted: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether a folder holds the model of this very run, killed between its training and its test.

    Raises:
        FileExistsError: it holds an untested model of other settings that may not be replaced.
    """
    if not (folder / RECORD).is_file() or not belong_together(folder):
        return False
    record = read_model_record(folder)
    training = record.training
    # without its specification it is not known whose it is
    other = ["settings, which are not recorded"]
    if training and training.specification:
        told = {"config": training.config.plain(), "objective": training.objective.plain()}
        other = differing(told | training.specification, wanted)
    if other and not overwrite:
        raise FileExistsError(
            f"{folder} holds a finished model of other {', '.join(other)}; name another folder, or replace it "
            "with --overwrite"
        )
    return not other and record.test is None


def _recipe_of(recipe: str | None, start: str | Path | None) -> str:
    """The recipe that a run follows; none without attack."""
    if recipe is not None and recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r} is not one of {', '.join(RECIPES)}")
    if start is None and recipe is not None:
        raise ValueError(f"recipe {recipe} hardens a trained model; give the folder of one as start")
    return (recipe or "adversarial") if start is not None else ""


def _objective(recipe: str, settings: Mapping[str, Any]) -> Standard:
    """The recipe with its own settings, after all of them are known to be somebody's."""
    own = {field.name for field in fields(RECIPES[recipe])} if recipe else set()
    # changes of the images are set by their strength alone
    unknown = set(settings) - own - ({*_AUGMENTATION, *TrainConfig.__dataclass_fields__} - {"augmentation"})
    if unknown:
        raise ValueError(f"{recipe or 'training'} has no setting {', '.join(sorted(unknown))}")
    if not recipe:
        return Standard()
    if "eps" not in settings:
        raise ValueError("hardening needs a radius, for instance eps=2/255")
    return make_objective(recipe, **{name: settings[name] for name in own & set(settings)})
