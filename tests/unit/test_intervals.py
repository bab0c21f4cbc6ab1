from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from scipy.stats import binom

from tests.toy import toy_images
from utils.data.sets import ImageSet
from utils.data.subject_ids import UNKNOWN
from utils.evaluation.intervals import (
    binary_caption,
    bootstrap_counts,
    compare,
    compare_auroc,
    mean_auroc,
    merge_classes,
    patient_groups,
    questions,
    report,
    scores_over_draws,
    share_interval,
)
from utils.evaluation.metrics import merge_by_patient, scores


def _random(n: int = 240, k: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    subjects = torch.arange(n) // 8
    labels = subjects % k
    logits = torch.randn(n, k, generator=draws) + 1.2 * torch.nn.functional.one_hot(labels, k)
    # ties must count half in an area under the curve
    return (logits.softmax(1) * 20).round() / 20 + 1e-9, labels, subjects


def test_each_draw_is_what_scikit_learn_says_of_the_drawn_patients() -> None:
    probabilities, labels, subjects = _random()
    probabilities = probabilities / probabilities.sum(1, keepdim=True)
    groups, counts = patient_groups(subjects), bootstrap_counts(30, draws=5, seed=1)
    found = scores_over_draws(probabilities.numpy().astype(float), labels.numpy(), groups, counts)
    for row, drawn in enumerate(counts):
        index = np.repeat(np.arange(240), drawn[groups].astype(int))
        truth, chances = labels.numpy()[index], probabilities.numpy()[index].astype(float)
        said, present = chances.argmax(1), np.unique(truth)
        assert found["accuracy"][row] == pytest.approx(sk.accuracy_score(truth, said))
        assert found["balanced_accuracy"][row] == pytest.approx(sk.balanced_accuracy_score(truth, said))
        assert found["macro_f1"][row] == pytest.approx(sk.f1_score(truth, said, labels=present, average="macro"))
        areas = [sk.roc_auc_score(truth == c, chances[:, c]) for c in present]
        assert found["auroc"][row] == pytest.approx(np.mean(areas))


def test_the_undrawn_set_gives_what_torchmetrics_does() -> None:
    probabilities, labels, subjects = _random()
    probabilities = probabilities / probabilities.sum(1, keepdim=True)
    counts = bootstrap_counts(30, draws=1)
    found = scores_over_draws(probabilities.numpy().astype(float), labels.numpy(), patient_groups(subjects), counts)
    stated = scores(probabilities, labels, ["Non", "VeryMild", "Mild", "Moderate"])
    for name, values in found.items():
        assert values[0] == pytest.approx(getattr(stated, name), abs=2e-3 if name == "calibration_error" else 1e-5)


def test_interval_is_as_wide_as_patients_make_it() -> None:
    # every patient wholly right or wholly wrong: 200 patients, not 1,600 images, decide the width
    draws = torch.Generator().manual_seed(0)
    right = torch.rand(200, generator=draws) < 0.7
    by_patient = share_interval(right.repeat_interleave(8), torch.arange(1600) // 8)
    low, high = binom.interval(0.95, 200, right.double().mean().item())
    assert by_patient[0] == pytest.approx(low / 200, abs=0.015) and by_patient[1] == pytest.approx(
        high / 200, abs=0.015
    )
    by_image = share_interval(right.repeat_interleave(8), torch.full((1600,), UNKNOWN))
    assert by_image[1] - by_image[0] < 0.5 * (by_patient[1] - by_patient[0])


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draws, hits = np.random.default_rng(0), 0
    for trial in range(60):
        chance = draws.beta(6, 4, size=40)
        flags = torch.from_numpy(draws.random((40, 8)) < chance[:, None]).flatten()
        low, high = share_interval(flags, torch.arange(320) // 8, seed=trial)
        hits += low <= 0.6 <= high
    assert hits >= 50


def test_paired_comparison() -> None:
    subjects = torch.arange(80) // 8
    first, second = torch.ones(80, dtype=torch.bool), torch.ones(80, dtype=torch.bool)
    second[:12] = False
    first[12:14] = False
    found = compare(first, second, subjects)
    assert (found.only_first, found.only_second) == (12, 2)
    assert found.difference == pytest.approx(10 / 80)
    assert found.mcnemar_p == pytest.approx(2 * binom.cdf(2, 14, 0.5))
    assert found.interval[0] <= 10 / 80 <= found.interval[1]
    same = compare(first, first, subjects)
    assert same.difference == 0 and same.interval == [0, 0] and same.mcnemar_p == 1
    with pytest.raises(ValueError, match="same images"):
        compare(first, second[:3], subjects)


def test_rankings_are_compared_in_pairs_within_folds() -> None:
    draws = torch.Generator().manual_seed(0)
    ill = [torch.arange(40) % 2 == 0, torch.arange(30) % 3 == 0]
    good, poor = ([strength * kinds + torch.randn(len(kinds), generator=draws) for kinds in ill] for strength in (2, 1))
    found = compare_auroc(good, poor, ill)
    areas = [np.mean([sk.roc_auc_score(kinds, own) for kinds, own in zip(ill, model)]) for model in (good, poor)]
    assert found.value == pytest.approx(areas[0] - areas[1])
    assert found.interval[0] < found.value < found.interval[1]
    alone = mean_auroc(good, ill)
    assert alone.value == pytest.approx(areas[0]) and alone.interval[0] < areas[0] < alone.interval[1]
    assert mean_auroc([-good[0], good[1]], ill).value == pytest.approx(
        (1 - sk.roc_auc_score(ill[0], good[0]) + sk.roc_auc_score(ill[1], good[1])) / 2
    )
    # a fold's own scale says nothing
    assert compare_auroc([good[0], 5 + 3 * good[1]], poor, ill) == found
    turned = compare_auroc(poor, good, ill)
    assert turned.value == pytest.approx(-found.value)
    assert turned.interval == pytest.approx([-bound for bound in reversed(found.interval)])
    same = compare_auroc(good, good, ill)
    assert same.value == 0 and same.interval == [0, 0]
    # what both get wrong together widens nothing
    noisy = [own + 1e-3 * torch.randn(len(own), generator=draws) for own in poor]
    close = compare_auroc(poor, noisy, ill)
    assert close.interval[1] - close.interval[0] < 0.2 * (found.interval[1] - found.interval[0])
    assert compare_auroc(good, poor, [ill[0], torch.ones(30, dtype=torch.bool)]) is None


def test_merged_classes_add_their_probabilities() -> None:
    probabilities = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    assert torch.allclose(merge_classes(probabilities, (0, 1, 1, 1)), torch.tensor([[0.1, 0.9]]))
    assert torch.allclose(merge_classes(probabilities, (0, 1, 2, 2)), torch.tensor([[0.1, 0.2, 0.7]]))


def test_report_asks_all_questions_at_both_levels() -> None:
    images = toy_images(240, seed=0)
    logits = torch.randn(240, 4, generator=torch.Generator().manual_seed(1))
    logits += 2 * torch.nn.functional.one_hot(images.labels, 4)
    found = report(logits, images)
    assert list(found) == ["4 classes", "3 classes", "binary"]
    binary = found["binary"]
    chance = 1 - logits.softmax(1)[:, 0]
    demented = images.labels > 0
    assert binary.image.auroc == pytest.approx(sk.roc_auc_score(demented, chance), abs=1e-5)
    means, truth = merge_by_patient(logits.softmax(1), images)
    assert binary.patient.n == len(truth) == 30
    assert binary.patient.auroc == pytest.approx(sk.roc_auc_score(truth > 0, 1 - means[:, 0]), abs=1e-5)
    for levels in found.values():
        for one in (levels.image, levels.patient):
            low, high = one.interval["accuracy"]
            assert low <= one.accuracy <= high
    unknown = toy_images(24, seed=0, k=3)
    unknown.subjects[:] = UNKNOWN
    alone = report(torch.randn(24, 3), unknown)
    assert list(alone) == ["3 classes", "binary"] and all(levels.patient is None for levels in alone.values())


@pytest.mark.parametrize(
    ("classes", "binary", "caption"),
    [
        (["Non", "VeryMild", "Mild", "Moderate"], (("Non", "demented"), (0, 1, 1, 1)), "Non against the rest"),
        (["Moderate", "Non", "Mild", "VeryMild"], (("Non", "demented"), (1, 0, 1, 1)), "Non against the rest"),
        (["CN", "MCI", "AD"], (("CN", "the rest"), (0, 1, 1)), "CN against the rest"),
        (["AD", "Normal"], None, "one class against the rest"),
        (["apple", "pear", "plum"], None, "one class against the rest"),
    ],
)
def test_the_coarse_question_is_named_by_the_class_that_it_asks_for(classes, binary, caption) -> None:
    assert questions(classes).get("binary") == binary
    labels = torch.arange(24) % len(classes)
    images = ImageSet(
        torch.zeros(24, 1, 4, 4, dtype=torch.uint8),
        labels,
        torch.arange(24) // 2,
        torch.zeros(24, dtype=torch.int64),
        torch.zeros(24, dtype=torch.bool),
        [""] * 24,
        classes,
    )
    found = report(torch.nn.functional.one_hot(labels, len(classes)).float() * 9, images)
    assert binary_caption(found) == caption and next(iter(found)) == f"{len(classes)} classes"
    assert all(level.image.accuracy == 1 for level in found.values())
