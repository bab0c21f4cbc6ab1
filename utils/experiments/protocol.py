"""One training, whoever asks for it: what a model begins from, how it is trained, and what is written of it.

`python -m utils train`, the recipes and the folds come here; the notebooks show the same steps one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.def_models import MRIClassifier, build_model
from utils.core.processes import is_main, wait_for_all
from utils.core.reproducibility import seed_everything
from utils.data.sets import DataSplits
from utils.data.workspace import Workspace
from utils.experiments.records import save_trained
from utils.training.checkpoints import load_trainable
from utils.training.config import TrainConfig
from utils.training.loop import print_epoch, train
from utils.training.objectives import Standard


def new_model(
    splits: DataSplits, backbone: str, *, image_size: int, weights: str, trainable: str | int, seed: int
) -> MRIClassifier:
    """What a training without attack begins from; says what published weights gave and left.

    Args:
        backbone, image_size, weights, trainable: see :func:`models.def_models.build_model`.
        seed: of all random numbers from here on.
    """
    seed_everything(seed)
    return build_model(
        backbone,
        num_classes=len(splits.classes),
        image_size=image_size,
        weights=weights,
        trainable=trainable,
        classes=splits.classes,
        say=print if is_main() else None,
    )


def model_to_harden(
    splits: DataSplits, start: str | Path, *, trainable: str | int, seed: int, backbone: str | None = None
) -> MRIClassifier:
    """The trained model in ``start``, which keeps its own input size.

    Args:
        trainable: see :func:`models.def_models.build_model`.
        seed: of all random numbers from here on.
        backbone: key of ``BACKBONES`` that it must be of; None takes any.

    Raises:
        ValueError: it is of another backbone, other classes or other data.
    """
    seed_everything(seed)
    fits: dict[str, Any] = {"classes": splits.classes, "fingerprint": splits.fingerprint}
    return load_trainable(start, trainable=trainable, **(fits | ({"backbone": backbone} if backbone else {})))


def train_and_save(
    model: MRIClassifier,
    splits: DataSplits,
    folder: Path,
    *,
    config: TrainConfig,
    objective: Standard,
    start: str,
    specification: Mapping[str, Any] | None = None,
) -> None:
    """Train, or go on with a killed training, and write weights and record with what must be said of the data.

    Args:
        start: what the record calls that from which ``model`` began.
        specification: see :func:`utils.experiments.records.save_trained`.

    Raises:
        BlockingIOError: another process is training into ``folder``.
        FloatingPointError: the loss became NaN or infinite.
    """
    say = print_epoch if is_main() else None
    result = train(model, splits, objective=objective, config=config, folder=folder, on_epoch=say)
    if is_main():
        save_trained(
            model,
            folder,
            splits=splits,
            result=result,
            config=config,
            objective=objective,
            start=start,
            note=Workspace.open().note(splits),
            specification=specification,
        )
    wait_for_all()
