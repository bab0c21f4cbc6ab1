"""Whether a trained model still stands and falls on the images on which its record says so.

    python -m utils spot-check --model ResNet34_atk

attacks 64 test images and compares each one's fate with the record; the first time it writes the record instead. With
``--worst-case`` it measures the record's worst case again, with its attacks, radii and images.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from utils.attacks.attack import Attack
from utils.attacks.suites import SUITES
from utils.core.paths import need
from utils.data.sets import ImageSet, load_splits
from utils.data.workspace import pick_device
from utils.evaluation.worst_case import robustness_curve
from utils.experiments.records import update_record
from utils.training.checkpoints import RECORD, load_checkpoint

SUITE, EPSILONS, IMAGES = "quick", (1 / 255, 2 / 255), 64
#: Other hardware rounds otherwise, and an image at the edge may fall to the other side.
MAY_DIFFER = 1
#: What the entries of a record that are compared must tell.
_PARTS = {
    "spot_check": ("spot_check.suite", "spot_check.epsilons", "spot_check.paths", "spot_check.first_broken"),
    "worst_case": tuple(
        f"worst_case.{key}"
        for key in (
            "seed",
            "curve.attacks",
            "curve.n_images",
            "curve.epsilons",
            "curve.robust_accuracy",
            "curve.first_broken",
        )
    ),
}
#: The same for robust accuracy, 0..1.
MAY_DIFFER_BY = 0.01


def fates(model: nn.Module, test: ImageSet) -> dict[str, Any]:
    """At which radius each of ``IMAGES`` test images, spread over patients, is first broken.

    Returns:
        plain values: ``suite``, ``epsilons``, ``paths`` and ``first_broken`` (index into ``epsilons``, 0 without
        attack, -1 never).
    """
    few = test.balanced_subset(IMAGES)
    curve = robustness_curve(model, few, attack=SUITES[SUITE], epsilons=EPSILONS, device=pick_device())
    return {"suite": SUITE, "epsilons": curve.epsilons, "paths": few.paths, "first_broken": curve.first_broken}


def differences(found: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """Paths of the images whose fate is another one.

    Raises:
        ValueError: the record is of other images or attacks.
    """
    if any(found[key] != stored[key] for key in ("suite", "epsilons", "paths")):
        raise ValueError("the record is of other images or other attacks; the test images here are not those of it")
    pairs = zip(found["paths"], found["first_broken"], stored["first_broken"], strict=True)
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
    _refuse_malformed(record, folder, "worst_case" if worst_case else "spot_check")
    model.to(pick_device())
    if worst_case:
        return f"{folder}: {worst_case_again(model, splits.test, record)}"
    found = fates(model, splits.test)
    if "spot_check" not in record:
        update_record(folder, spot_check=found)
        return f"{folder}: recorded {len(found['paths'])} images"
    other = differences(found, record["spot_check"])
    if len(other) > MAY_DIFFER:
        raise ValueError(f"{folder} differs from its record on {len(other)} images, for example {other[0]}")
    return f"{folder}: {len(found['paths']) - len(other)} of {len(found['paths'])} images as recorded"


def _refuse_malformed(record: dict[str, Any], folder: Path, name: str) -> None:
    """Raise ValueError, before any attack, where the entry to compare with is none of this project."""
    if name not in record:
        return
    need(record, _PARTS[name], folder / RECORD, f"delete its {name}, and measure again")
    own = record["worst_case"]["curve"] if name == "worst_case" else record["spot_check"]
    pairs = ("epsilons", "robust_accuracy") if name == "worst_case" else ("paths", "first_broken")
    lists = [own[key] for key in pairs]
    if not all(isinstance(one, list) for one in lists) or len({len(one) for one in lists}) > 1:
        raise ValueError(f"{folder / RECORD}: {' and '.join(pairs)} of its {name} are no lists of one length")


def worst_case_again(model: nn.Module, test: ImageSet, record: Mapping[str, Any]) -> str:
    """Measure the worst case of a model's record anew, and say how it compares.

    Raises:
        ValueError: it differs at some radius by more than ``MAY_DIFFER_BY``; a record without worst case.
    """
    if "worst_case" not in record:
        raise ValueError("the record holds no attack; run the _atk notebook to the end")
    stored = record["worst_case"]["curve"]
    try:
        attacks = [Attack.from_dict(own) for own in stored["attacks"]]
    except TypeError as error:
        raise ValueError(f"the attacks of the record's worst_case are none of this project ({error})") from None
    few = test.balanced_subset(stored["n_images"])
    options = {"epsilons": stored["epsilons"], "seed": record["worst_case"]["seed"], "device": pick_device()}
    found = robustness_curve(model, few, attack=attacks, **options)
    pairs = list(zip(found.robust_accuracy, stored["robust_accuracy"], strict=True))
    now, then = (", ".join(f"{100 * share:.1f}" for share in shares) for shares in zip(*pairs))
    same = sum(a == b for a, b in zip(found.first_broken, stored["first_broken"], strict=True))
    said = f"robust accuracy {now} %, in the record {then} %; {same} of {len(few)} images as recorded"
    if max(abs(a - b) for a, b in pairs) > MAY_DIFFER_BY:
        raise ValueError(said)
    return said
