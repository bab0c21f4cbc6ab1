from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data.phantom import PhantomConfig, make_phantoms
from utils.data.splits import SPLITS, assign_splits, check_ratios, patient_folds, split_patients
from utils.data.subject_ids import UNKNOWN
from utils.data.subjects import find_duplicates, find_subjects, find_synthetic


@pytest.fixture(scope="module")
def stacks():
    return make_phantoms(PhantomConfig(n_subjects=8, n_levels=32, seed=3))


@pytest.mark.slow
def test_patients_are_found_from_pixels_alone(stacks) -> None:
    found = find_subjects(stacks.pixels, stacks.labels)
    pairs = {(a, b) for a, b in zip(found.subject.tolist(), stacks.subjects.tolist())}
    assert found.count == 8 and len(pairs) == 8


def test_slices_are_ordered_from_the_base_upwards(stacks) -> None:
    shuffled = np.random.default_rng(0).permutation(len(stacks))
    found = find_subjects(stacks.pixels[shuffled], stacks.labels[shuffled])
    true_level = shuffled % 32
    for patient in range(8):
        mine = found.subject == patient
        assert np.corrcoef(found.slice[mine], true_level[mine])[0, 1] > 0.97


def test_duplicates_and_synthetic_images(stacks) -> None:
    pixels, labels = stacks.pixels[:64].copy(), stacks.labels[:64].copy()
    pixels[40] = pixels[3]
    pixels[50, :4, :4] = 9
    found = find_subjects(pixels, labels, synthetic=find_synthetic(pixels)[0])
    assert np.flatnonzero(find_duplicates(pixels)).tolist() == [40] and found.duplicate[40]
    assert np.flatnonzero(found.synthetic).tolist() == [50] and found.subject[50] == UNKNOWN
    assert (found.subject[40], found.slice[40]) == (found.subject[3], found.slice[3])


def test_images_without_black_corners_are_all_real() -> None:
    pixels = np.full((4, 64, 64), 80, np.uint8)
    flagged, notes = find_synthetic(pixels)
    assert not flagged.any() and "cannot be told" in notes[0]


@pytest.mark.slow
def test_odd_groups_are_reported(stacks) -> None:
    mixed = find_subjects(stacks.pixels, np.arange(len(stacks)) % 4).notes
    merged = find_subjects(stacks.pixels, stacks.labels, threshold=0.2).notes
    single = find_subjects(stacks.pixels, stacks.labels, threshold=0.99999).notes
    assert any("several classes" in note for note in mixed) and any("largest" in note for note in merged)
    assert any("single image" in note for note in single)


patients_a_class = st.lists(st.integers(2, 40), min_size=2, max_size=5)
shares = st.tuples(st.integers(1, 8), st.integers(0, 4), st.integers(1, 4)).map(lambda t: tuple(v / sum(t) for v in t))


@settings(max_examples=80, deadline=None)
@given(counts=patients_a_class, ratios=shares, seed=st.integers(0, 2**32 - 1), slices=st.integers(1, 4))
def test_patient_split_never_shares_a_patient(counts, ratios, seed, slices) -> None:
    labels = np.repeat(np.repeat(np.arange(len(counts)), counts), slices)
    subject = np.repeat(np.arange(sum(counts)), slices)
    classes = tuple(map(str, range(len(counts))))
    sides = split_patients(subject, labels, classes, ratios, np.random.default_rng(seed))
    again = split_patients(subject, labels, classes, ratios, np.random.default_rng(seed))
    assert sides == again and set(sides) == set(subject.tolist()) and set(sides.values()) <= set(SPLITS)
    for label in range(len(counts)):
        own = [sides[p] for p in np.unique(subject[labels == label])]
        assert "train" in own and "test" in own
        for side, share in zip(SPLITS, ratios):
            assert abs(own.count(side) - share * len(own)) < 2


def _assign(protocol: str, n: int = 40, **changes):
    arguments = {
        "labels": np.arange(n) % 2,
        "subject": np.arange(n) // 4 * 2 + np.arange(n) % 2,
        "synthetic": np.zeros(n, bool),
        "duplicate": np.zeros(n, bool),
        "folders": ["train"] * (n - 8) + ["test"] * 8,
        "classes": ("a", "b"),
    }
    return assign_splits(protocol, **(arguments | changes))


def test_published_split_keeps_its_test_folder() -> None:
    split = _assign("published")
    assert (split[-8:] == "test").all() and set(split[:-8]) == {"train", "validation"}


def test_synthetic_images_and_copies_stay_out_of_the_patient_split() -> None:
    synthetic, duplicate = np.zeros(40, bool), np.zeros(40, bool)
    synthetic[5], duplicate[6] = True, True
    split = _assign("patient", synthetic=synthetic, duplicate=duplicate)
    assert split[5] == split[6] == "" and (np.delete(split, [5, 6]) != "").all()
    assert (_assign("random", synthetic=synthetic, duplicate=duplicate) != "").all()


@pytest.mark.parametrize(
    "ratios",
    [(0.5, 0.5), (0.7, 0.7, -0.4), (0.2, 0.2, 0.2), (0.0, 0.5, 0.5), (0.8, 0.0, 0.2), (float("nan"), 0.2, 0.2)],
)
def test_bad_ratios(ratios) -> None:
    with pytest.raises(ValueError):
        check_ratios("patient", ratios)


def test_too_few_patients_and_missing_folders() -> None:
    with pytest.raises(ValueError, match="too few patients.*class b has 1"):
        _assign("patient", subject=np.where(np.arange(40) % 2, 99, np.arange(40)))
    with pytest.raises(ValueError, match="validation would be empty"):
        _assign("patient", n=8, subject=np.arange(8) % 4)
    with pytest.raises(ValueError, match="train/ and test/"):
        _assign("published", folders=[""] * 40)


def test_folds_test_every_image_once_and_share_no_patient() -> None:
    subject, labels = np.arange(60) // 3, np.arange(60) // 3 % 2
    folds = patient_folds(subject, labels, n_folds=5, seed=1)
    assert sorted(np.concatenate([test for _, test in folds]).tolist()) == list(range(60))
    assert all(not set(subject[train]) & set(subject[test]) for train, test in folds)


def test_mirrored_copies_belong_to_their_patient(stacks) -> None:
    pixels = np.concatenate([stacks.pixels, stacks.pixels[:, :, ::-1]])
    found = find_subjects(pixels, np.tile(stacks.labels, 2))
    assert found.count == 8 and np.array_equal(found.subject[:256], found.subject[256:])


def test_two_patients_train_and_test_whatever_the_ratios() -> None:
    rng = np.random.default_rng(0)
    for ratios in ((0.2, 0.6, 0.2), (0.25, 0.5, 0.25), (0.1, 0.8, 0.1)):
        sides = split_patients(np.arange(4), np.arange(4) % 2, ("a", "b"), ratios, rng)
        assert sorted(sides.values()) == ["test", "test", "train", "train"]
