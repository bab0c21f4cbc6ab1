from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.data.phantom import PhantomConfig, make_phantoms
from utils.data.preparation import group_by_subject, splits_in_memory
from utils.evaluation.leak_audit import (
    audit_splits,
    audit_table,
    certified_radii,
    cross_validated_accuracy,
    nearest_neighbours,
)


def test_same_seed_same_images() -> None:
    config = PhantomConfig(n_subjects=8, n_levels=2, seed=4)
    one, two = make_phantoms(config), make_phantoms(config)
    other = make_phantoms(PhantomConfig(n_subjects=8, n_levels=2, seed=5))
    assert np.array_equal(one.pixels, two.pixels) and not np.array_equal(one.pixels, other.pixels)


def test_phantoms_look_like_skull_stripped_slices(phantoms) -> None:
    assert phantoms.pixels.shape[1:] == (128, 128) and phantoms.pixels.dtype == np.uint8
    assert not phantoms.pixels[:, :12, :12].any() and not phantoms.pixels[:, -12:, -12:].any()
    brain = (phantoms.pixels > 0).mean((1, 2))
    assert brain.min() > 0.4 and brain.max() < 0.6
    exposures = [phantoms.pixels[phantoms.labels == label].max((1, 2)).mean() for label in range(4)]
    assert max(exposures) - min(exposures) < 8


def test_ventricles_and_sulci_grow_with_the_stage(phantoms) -> None:
    dark = [(phantoms.pixels[phantoms.labels == label] < 70).mean() for label in range(4)]
    assert dark == sorted(dark)


def test_difficulty_spreads_patients() -> None:
    def spread(difficulty: float) -> float:
        raw = make_phantoms(PhantomConfig(n_subjects=32, n_levels=1, difficulty=difficulty))
        share = ((raw.pixels < 70) & (raw.pixels > 0)).mean((1, 2))
        return float(np.mean([share[raw.labels == label].std() for label in range(4)]))

    assert spread(1.0) > 2 * spread(0.0)
    with pytest.raises(ValueError, match="difficulty"):
        PhantomConfig(difficulty=3)


@pytest.mark.slow
def test_leak_lesson_on_phantoms() -> None:
    raw = make_phantoms()
    subjects = group_by_subject(raw)
    published, patient = audit_splits(*(splits_in_memory(raw, subjects, name) for name in ("published", "patient")))
    assert published.accuracy > 0.8 and published.same_patient > 0.8
    assert patient.accuracy < 0.65 and patient.same_patient == 0
    assert published.max_correlation > patient.max_correlation
    for audit in (published, patient):
        assert audit.certified_accuracy == sorted(audit.certified_accuracy, reverse=True)
        assert audit.certified_accuracy[0] == pytest.approx(audit.accuracy, abs=1e-3)
        assert len(audit.certified_accuracy) == len(audit.epsilons)
    assert published.certified_accuracy[-1] > patient.certified_accuracy[-1]
    assert list(audit_table([published, patient]).index) == ["published", "patient"]
    merged = splits_in_memory(raw, subjects, "patient")
    everything = merged.train.join(merged.validation).join(merged.test)
    assert cross_validated_accuracy(everything) < 0.65


def _points(seed: int, n_train: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    train, test = (draws.random((n, size)) for n in (n_train, 8))
    return train, draws.integers(0, 3, n_train), test, draws.integers(0, 3, 8)


@given(seed=st.integers(0, 10**6), n_train=st.integers(1, 80), size=st.integers(1, 5))
def test_no_change_within_the_certified_radius_turns_an_answer_wrong(seed: int, n_train: int, size: int) -> None:
    train, train_labels, test, labels = _points(seed, n_train, size)
    radii = certified_radii(train, train_labels, test, labels)
    right = train_labels[nearest_neighbours(train, test)[0]] == labels
    assert right[radii > 0].all() and not (radii < 0).any() and not right[radii == 0].any()
    assert np.array_equal(radii == np.inf, np.array([(train_labels == label).all() for label in labels]))
    draws = np.random.default_rng(seed)
    for radius in (0.5 * radii, 0.999 * radii):
        for _ in range(20):
            # corners of the ball, where a linear border is met first, and points between them
            away = draws.choice([draws.choice([-1.0, 1.0], test.shape), draws.uniform(-1, 1, test.shape)])
            moved = test + np.minimum(radius, 10)[:, None] * away
            answers = train_labels[nearest_neighbours(train, moved)[0]]
            assert (answers == labels)[radii > 1e-9].all()


@given(seed=st.integers(0, 10**6), n_train=st.integers(2, 80), size=st.integers(1, 5))
def test_the_certified_radius_is_exact_where_a_class_has_one_row(seed: int, n_train: int, size: int) -> None:
    train, _, test, _ = _points(seed, n_train, size)
    train_labels, labels = np.arange(n_train) > 0, np.zeros(len(test), dtype=bool)
    radii = certified_radii(train, train_labels, test, labels)
    assert np.array_equal(certified_radii(train, train_labels, test, labels, limit=0.1), np.minimum(radii, 0.1))
    directions = np.sign(train[1:] - train[0])
    for image, radius in zip(test, radii):
        moved = image + (radius + 1e-6) * directions
        assert nearest_neighbours(train, moved)[0].any()
