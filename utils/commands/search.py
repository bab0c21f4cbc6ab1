"""Search the hyperparameters of a training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from models.def_models import BACKBONES, MRIClassifier, build_model, default_size
from utils.commands.boundary import command
from utils.commands.options import Radius
from utils.core.checks import choice
from utils.core.paths import CHECKPOINTS, DATASET_VARIABLES
from utils.data.sets import DataSplits, load_splits
from utils.data.workspace import pick_device
from utils.experiments.search_space import pick_space
from utils.optuna_search import optuna_search
from utils.training.checkpoints import load_trainable
from utils.training.config import SLICES_PER_PATIENT, TrainConfig
from utils.training.objectives import make_objective


@command("python -m utils search")
def main(
    *,
    backbone: str,
    n_trials: int,
    data: Path = DATASET_VARIABLES,
    num_epochs: int = 3,
    space: tuple[str, ...] = (),
    weights: str = "scratch",
    image_size: int = 0,
    seed: int = 0,
    journal: Path | None = None,
    worker: int = 0,
    out: Path | None = None,
    start: Path | None = None,
    recipe: str = "adversarial",
    eps: Radius = 2 / 255,
    train_steps: int = 2,
    clean_floor: float = 0.0,
    pareto: bool = False,
) -> None:
    """Search the hyperparameters of a training, or with --start of a hardening, with Optuna.

    Args:
        backbone: dino_v2, resnet34, efficientnet_b0, or one of your own in models/def_models.py.
        n_trials: in all, over all workers.
        data: folder of prepared *_set.pt.
        num_epochs: epochs a trial, each of 8 random slices of every patient.
        space: names of SEARCH_SPACE in utils/optuna_search.py; without it all that apply.
        weights: scratch, pretrained, or the path of a weights file.
        image_size: side in pixels of what the backbone sees; 0 takes 128 on a CPU (126 for DINOv2), 224 on a GPU.
        seed: of the sampler and of the trainings.
        journal: file that workers share and from which an interrupted search goes on.
        worker: number of this process.
        out: file of the result; without it checkpoints/optuna_params/<Model>.json.
        start: folder of the model to harden; without it new ones are trained.
        recipe: how to harden: adversarial, trades, mart or n_fgsm.
        eps: radius of hardening, such as 2/255 or 0.005.
        train_steps: PGD steps a training step.
        clean_floor: least accuracy without attack, 0..1.
        pareto: maximise accuracy with and without attack together.
    """
    choice("--backbone", backbone, BACKBONES)
    objective = make_objective(recipe, eps=eps, steps=train_steps) if start else None
    splits = load_splits(data)
    title = BACKBONES[backbone].title + ("_atk" if start else "")
    found = optuna_search(
        _model_maker(splits, backbone, image_size or default_size(backbone, pick_device()), weights, start),
        splits,
        config=TrainConfig(slices_per_patient=SLICES_PER_PATIENT),
        num_epochs=num_epochs,
        n_trials=n_trials,
        out=out or CHECKPOINTS / "optuna_params" / f"{title}.json",
        space=pick_space(list(space), freezing=bool(start) or weights != "scratch"),
        objective=objective,
        clean_floor=clean_floor,
        pareto=pareto,
        seed=seed,
        journal=journal,
        worker=worker,
    )
    print(f"best {found['selected_by']} {found['value']:.1%} with {found['params']}")
    if not found["floor_reached"]:
        print(f"no trial reached a clean accuracy of {clean_floor:.1%}; this one came closest")


def _model_maker(
    splits: DataSplits, backbone: str, image_size: int, weights: str, start: Path | None
) -> Callable[[], MRIClassifier]:
    if start is None:
        return partial(build_model, backbone, num_classes=len(splits.classes), image_size=image_size, weights=weights)
    load = partial(load_trainable, start, backbone=backbone, classes=splits.classes, fingerprint=splits.fingerprint)
    load()  # a model that does not fit is refused before the first trial
    return load
