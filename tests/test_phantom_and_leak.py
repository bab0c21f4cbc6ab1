from __future__ import annotations

import numpy as np
import pytest

from utils.leak_audit import audit_splits, audit_table, cross_validated_accuracy
from utils.phantom import PhantomConfig, make_phantoms
from utils.prepare import group_by_subject, splits_in_memory


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


def test_leak_lesson_on_phantoms() -> None:
    raw = make_phantoms()
    subjects = group_by_subject(raw)
    published, patient = audit_splits(*(splits_in_memory(raw, subjects, name) for name in ("published", "patient")))
    assert published.accuracy > 0.8 and published.same_patient > 0.8
    assert patient.accuracy < 0.65 and patient.same_patient == 0
    assert published.max_correlation > patient.max_correlation
    assert list(audit_table([published, patient]).index) == ["published", "patient"]
    merged = splits_in_memory(raw, subjects, "patient")
    everything = merged.train.join(merged.validation).join(merged.test)
    assert cross_validated_accuracy(everything) < 0.65
