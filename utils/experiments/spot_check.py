"""Whether a trained model is still robust, and misclassifies, on the images on which its record says so.

    python -m utils spot-check --model ResNet34_atk

attacks 64 test images and compares each one's fate with the record; the first time it writes the record instead. With
``--worst-case`` it measures the record's worst case again, with its attacks, radii and images.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from utils.attacks.attack import Attack
from utils.attacks.suites import SUITES
from utils.data.sets import ImageSet, load_splits
from utils.data.workspace import pick_device
from utils.evaluation.worst_case import robustness_curve
from utils.experiments.records import update_record
from utils.training.checkpoints import load_checkpoint
from utils.training.record import ModelRecord, SpotCheck

SUITE, EPSILONS, IMAGES = "quick", (1 / 255, 2 / 255), 64
#: Other hardware rounds otherwise, and an image at the edge may fall to the other side.
MAY_DIFFER = 1
#: The same for robust accuracy, 0..1.
MAY_DIFFER_BY = 0.01


def fates(model: nn.Module, test: ImageSet) -> SpotCheck:
    """At which radius each of ``IMAGES`` test images, spread over patients, is first misclassified."""
    few = test.balanced_subset(IMAGES)
    curve = robustness_curve(model, few, attack=SUITES[SUITE], epsilons=EPSILONS, device=pick_device())
    return SpotCheck(suite=SUITE, epsilons=curve.epsilons, paths=few.paths, first_broken=curve.first_broken)


def differences(found: SpotCheck, stored: SpotCheck) -> list[str]:
    """Paths of the images whose fate is another one.

    Raises:
        ValueError: the record is of other images or attacks.
    """
    if (found.suite, found.epsilons, found.paths) != (stored.suite, stored.epsilons, stored.paths):
        raise ValueError("the record is of other images or other attacks; the test images here are not those of it")
    pairs = zip(found.paths, found.first_broken, stored.first_broken, strict=True)
    return [path for path, now, then in pairs if now != then]


def check(folder: Path, data: Path, *, worst_case: bool = False) -> str:
    """Compare a checkpoint with its record, or write the record; says what was done.

    Args:
        folder: of the checkpoint.
        data: folder of the prepared data it was trained on.
        worst_case: measure the record's worst case again instead of the fate of a few images.

    Raises:
        ValueError: more than ``MAY_DIFFER`` images have another fate, or the worst case leaves more or less than it did
            by above ``MAY_DIFFER_BY``; a record without worst case.
    """
    splits = load_splits(data)
    model, record = load_checkpoint(folder, classes=splits.classes, fingerprint=splits.fingerprint)
    model.to(pick_device())
    if worst_case:
        return f"{folder}: {worst_case_again(model, splits.test, record)}"
    found = fates(model, splits.test)
    if record.spot_check is None:
        update_record(folder, spot_check=found)
        return f"{folder}: recorded {len(found.paths)} images"
    other = differences(found, record.spot_check)
    if len(other) > MAY_DIFFER:
        raise ValueError(f"{folder} differs from its record on {len(other)} images, for example {other[0]}")
    return f"{folder}: {len(found.paths) - len(other)} of {len(found.paths)} images as recorded"


def worst_case_again(model: nn.Module, test: ImageSet, record: ModelRecord) -> str:
    """Measure the worst case of a model's record anew, and say how it compares.

    Raises:
        ValueError: it differs at some radius by more than ``MAY_DIFFER_BY``; a record without worst case.
    """
    if record.worst_case is None:
        raise ValueError("the record holds no attack; run the _atk notebook to the end")
    stored = record.worst_case.curve
    try:
        attacks = [Attack.from_dict(own.plain()) for own in stored.attacks]
    except (TypeError, ValueError) as error:
        raise ValueError(f"the attacks of the record's worst_case are none of this project ({error})") from None
    few = test.balanced_subset(stored.n_images)
    found = robustness_curve(
        model, few, attack=attacks, epsilons=stored.epsilons, seed=record.worst_case.seed, device=pick_device()
    )
    pairs = list(zip(found.robust_accuracy, stored.robust_accuracy, strict=True))
    now, then = (", ".join(f"{100 * share:.1f}" for share in shares) for shares in zip(*pairs))
    same = sum(a == b for a, b in zip(found.first_broken, stored.first_broken, strict=True))
    said = f"robust accuracy {now} %, in the record {then} %; {same} of {len(few)} images as recorded"
    if max(abs(a - b) for a, b in pairs) > MAY_DIFFER_BY:
        raise ValueError(said)
    return said
