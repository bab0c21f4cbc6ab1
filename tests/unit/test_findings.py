"""What a notebook says that it found follows from the scores beside it, and from nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from models.def_models import BACKBONES, default_size
from tests.toy import toy_images
from utils.evaluation.leak_audit import LeakAudit
from utils.evaluation.metrics import Levels, Metrics, Scores
from utils.evaluation.robustness import SuiteRecord
from utils.reporting.findings import leak_findings, robustness_findings, training_findings


def _scores(accuracy: float, auroc: float | None, bounds: list[float] | None = None, **recall: float | None) -> Scores:
    shares = {"accuracy": accuracy, "balanced_accuracy": 0.3, "macro_f1": 0.3, "auroc": auroc}
    interval = {"auroc": bounds, "accuracy": [accuracy - 0.05, accuracy + 0.05]}
    return Scores.model_validate({"n": 40, **shares, "recall": recall, "interval": interval})


def _metrics(accuracy: float, auroc: float | None, bounds: list[float] | None = None) -> Metrics:
    image = _scores(accuracy, 0.5, CN=0.9, MCI=0.125, AD=None)
    whole = Levels(image=image, patient=_scores(0.5, 0.99))
    binary = Levels(image=_scores(0.5, 0.5, CN=0.9, rest=0.1), patient=_scores(0.5, auroc, bounds))
    return {"3 classes": whole, "binary": binary}


RIVALS = {"majority": _metrics(0.625, 0.5, [0.5, 0.5]), "two sizes": _metrics(0.5, 0.75, [0.6, 0.875])}


def test_a_model_stands_beside_the_best_baseline_of_each_question() -> None:
    said = training_findings("ResNet34_atk", _metrics(0.55, 0.7, [0.5, 0.9]), RIVALS, "phantom demo")
    assert said[0] == "phantom demo"
    assert (
        "ResNet34, hardened is right on 55.0 % of 40 test images" in said[1] and "majority is right on 62.5" in said[1]
    )
    assert "By patient (40), CN against the rest" in said[2] and "AUROC is 70.0 %" in said[2]
    assert "that of two sizes is 75.0 %: no difference is shown" in said[2]
    assert said[3] == "Of the classes it finds MCI least often: recall 12.5 %."


def test_what_a_split_gives_away_is_the_difference_of_two_audits() -> None:
    def audited(protocol: str, accuracy: float, same: float | None, expected: float | None) -> LeakAudit:
        return LeakAudit(protocol, 100, 40, accuracy, 0.5, same, 0.99, np.zeros(40), expected=expected)

    published, patient = audited("published", 0.975, None, 0.55), audited("patient", 0.5, 0.0, None)
    said = leak_findings([published, patient], "phantom demo")
    assert said[0] == "phantom demo" and "97.5 % of 40 test images; the classes alone give 55.0 %." in said[1]
    assert "is right on 50.0 % of 40 test images. It is of the same patient for 0.0 %." in said[2]
    assert said[3].startswith("So 47.5 points of a score on the published split")
    assert len(leak_findings([patient, patient])) == 2
    with pytest.raises(ValueError, match="audit"):
        leak_findings([])


@pytest.mark.parametrize(
    ("bounds", "told"), [([0.9, 0.95], "the network is better"), ([0.3, 0.55], "the network is worse")]
)
def test_only_intervals_that_are_apart_tell_a_model_from_a_baseline(bounds: list[float], told: str) -> None:
    assert told in training_findings("DINOv2", _metrics(0.5, sum(bounds) / 2, bounds), RIVALS)[1]


def test_without_known_patients_nothing_is_said_by_patient() -> None:
    unknown = {name: Levels(image=own.image, patient=None) for name, own in _metrics(0.5, 0.5).items()}
    said = training_findings("DINOv2", unknown, {"majority": unknown})
    assert len(said) == 2 and not any("patient" in line for line in said)
    with pytest.raises(ValueError, match="needs a baseline"):
        training_findings("DINOv2", unknown, {})


def _worst(robust: tuple[float, float], eps: float = 2 / 255, n_images: int = 40) -> SuiteRecord:
    curve = {"title": "FGSM", "attacks": [], "threat": {"title": "L-inf"}, "n_images": n_images, "n_subjects": 40}
    curve |= {"epsilons": [0.0, eps], "robust_accuracy": [*robust], "rounded_accuracy": [None] * 2}
    curve |= {"max_norm": [0.0] * 2, "broken_by": [-1] * n_images, "first_broken": [-1] * n_images, "seconds": 1.0}
    told = {"title": "x", "classes": ["CN"], "data": {"source": "phantom", "protocol": "patient"}, "panel": None}
    told |= {"metrics": [{}, {}], "answers": {"probability": [], "right": []}}
    told |= {"interval": [[share - 0.1, share + 0.1] for share in robust]}
    return SuiteRecord.model_validate(told | {"curve": curve})


def test_who_keeps_most_is_read_at_the_radius_that_was_asked_for() -> None:
    records = {"ResNet34": _worst((0.8, 0.1)), "ResNet34_atk": _worst((0.6, 0.4))}
    first, beside, checks = robustness_findings(records, RIVALS, 2 / 255)
    assert "within 2/255, ResNet34, hardened keeps most" in first
    assert "ResNet34 80.0 → 10.0; ResNet34, hardened 60.0 → 40.0" in first
    assert "majority is right on 62.5 %; without attack, shown to be above that: ResNet34." in beside
    assert checks.endswith("ResNet34 unchecked; ResNet34, hardened unchecked.")
    assert "this is what is left" in robustness_findings({"A": _worst((0.5, 0.1))}, RIVALS, 2 / 255)[0]
    assert "above that: none of them" in robustness_findings({"A": _worst((0.5, 0.1))}, RIVALS, 2 / 255, "note")[2]


@pytest.mark.parametrize(
    ("second", "third", "told"),
    [(0.29, 0.1, True), (0.31, 0.1, False), (0.5, 0.1, False), (0.1, 0.29, True), (0.1, 0.31, False)],
)
def test_only_intervals_that_are_apart_tell_models_from_each_other(second: float, third: float, told: bool) -> None:
    records = {"A": _worst((0.9, 0.5)), "B": _worst((0.9, second)), "C": _worst((0.9, third))}
    first = robustness_findings(records, RIVALS, 2 / 255)[0]
    assert ("A keeps most (" in first) == told
    assert ("no model is shown to keep more than all others (" in first) != told
    # 62.5 and 5 points to either side of the majority, and 10 of each model
    for clean, above in ((0.77, "none of them"), (0.78, "A")):
        assert f"above that: {above}." in robustness_findings({"A": _worst((clean, 0.1))}, RIVALS, 2 / 255)[1]


def test_on_the_same_images_the_paired_difference_tells() -> None:
    images = toy_images(320, seed=0)
    records = {"A": _worst((0.9, 0.5), n_images=320), "B": _worst((0.9, 0.45), n_images=320)}
    slices = np.arange(320) % 8  # of eight slices of each patient A loses four, and B these and one more
    for title, lost in (("A", slices < 4), ("B", slices < 5)):
        records[title].curve.first_broken[:] = np.where(lost, 1, -1).tolist()
    assert "A keeps most" in robustness_findings(records, RIVALS, 2 / 255, "", images)[0]
    for others in (None, toy_images(80, seed=0)):
        assert "no model is shown" in robustness_findings(records, RIVALS, 2 / 255, "", others)[0]


def test_an_unknown_interval_tells_nothing_apart() -> None:
    records = {"A": _worst((0.9, 0.9)), "B": _worst((0.1, 0.1))}
    records["B"].interval[:] = [None, None]
    assert "no model is shown to keep more" in robustness_findings(records, RIVALS, 2 / 255)[0]


def test_who_was_attacked_on_fewer_images_is_told() -> None:
    three = {"A": _worst((0.8, 0.1), n_images=320), "B_atk": _worst((0.8, 0.4), n_images=320), "C": _worst((0.9, 0.3))}
    first, beside, _ = robustness_findings(three, RIVALS, 2 / 255)
    assert "A 80.0 → 10.0; B, hardened 80.0 → 40.0; C 90.0 → 30.0 on 40 of them)" in first
    assert "above that: A; B, hardened; C." in beside


@pytest.mark.parametrize(
    ("records", "named"),
    [
        ({}, "one of them is missing"),
        ({"A": _worst((0.5, 0.1)), "B": _worst((0.5, 0.1), 4 / 255)}, "A, B have no radius in common"),
    ],
)
def test_what_was_not_measured_is_not_told(records: dict[str, SuiteRecord], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        robustness_findings(records, RIVALS, 2 / 255)


def test_a_radius_off_the_grid_is_told_of_at_the_nearest_one() -> None:
    # a notebook hardens at a radius that its sweep need not hold, and must not stop there after hours
    assert "within 4/255" in robustness_findings({"A": _worst((0.5, 0.1), 4 / 255)}, RIVALS, 3 / 255)[0]


def test_a_size_that_nobody_names_fits_backbone_and_device() -> None:
    assert {name: default_size(name, "cpu") for name in BACKBONES if name in ("dino_v2", "resnet34")} == {
        "dino_v2": 126,
        "resnet34": 128,
    }
    assert default_size("dino_v2", "cuda") == default_size("efficientnet_b0", "cuda") == 224
    with pytest.raises(ValueError, match="'vgg' is not one of dino_v2"):
        default_size("vgg", "cpu")
