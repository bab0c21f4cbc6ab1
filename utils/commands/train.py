"""Train or harden one model, in one process or in many."""

from __future__ import annotations

from pathlib import Path

from models.def_models import BACKBONES, default_size
from utils.commands.boundary import command
from utils.commands.options import Trainable
from utils.core.paths import DATASET_VARIABLES
from utils.data.sets import load_splits
from utils.data.workspace import Workspace, pick_device
from utils.experiments.calibrate import calibrate
from utils.experiments.fit import fit, folder_of
from utils.experiments.records import read_model_record
from utils.training.config import SLICES_PER_PATIENT, parse_assignment


@command("python -m utils train")
def main(
    *,
    backbone: str,
    data: Path = DATASET_VARIABLES,
    out: Path | None = None,
    image_size: int = 0,
    weights: str = "scratch",
    trainable: Trainable = "all",
    start: Path | None = None,
    recipe: str | None = None,
    set: tuple[str, ...] = (),
    overwrite: bool = False,
) -> None:
    """Train or harden one model, and make it ready for scans of one's own.

    Args:
        backbone: dino_v2, resnet34, efficientnet_b0, or one of your own in models/def_models.py.
        data: folder of prepared *_set.pt.
        out: folder of weights and record; without it the model's own in checkpoints/.
        image_size: side in pixels of what the backbone sees; 0 takes 128 on a CPU (126 for DINOv2), 224 on a GPU.
        weights: scratch, pretrained, or the path of a weights file.
        trainable: all, head, or the head and the last N blocks.
        start: folder of the model to harden; without it a new one is trained.
        recipe: how to harden the model of --start: adversarial, trades, mart or n_fgsm; without it adversarial.
        set: settings of the training and of the recipe as NAME=VALUE, such as num_epochs=20 or eps=2/255; an epoch
            takes 8 random slices of each patient unless slices_per_patient says otherwise.
        overwrite: replace a finished model.
    """
    if start and image_size:
        _check_size(start, backbone, image_size)
    record = fit(
        backbone,
        data,
        out,
        image_size=image_size or default_size(backbone, pick_device()),
        weights=weights,
        trainable=trainable,
        start=start,
        recipe=recipe,
        settings={"slices_per_patient": SLICES_PER_PATIENT} | dict(map(parse_assignment, set)),
        overwrite=overwrite,
    )
    if record:
        print(f"test accuracy {record.accuracy:.1%}, {record.trained.seconds / 60:.1f} min")
        folder = out or folder_of(backbone, hardened=start is not None)
        calibrate(Workspace.open(), folder, load_splits(data))
        print(f"ready for python -m utils predict SCAN --model {folder}")


def _check_size(start: Path, backbone: str, image_size: int) -> None:
    """A hardened model sees images at the size of its start."""
    patch, known = BACKBONES[backbone].patch if backbone in BACKBONES else 1, read_model_record(start).model.image_size
    if known != -(-image_size // patch) * patch:
        raise ValueError(f"--image-size {image_size}: the model in {start} sees {known} pixels, which hardening keeps")
