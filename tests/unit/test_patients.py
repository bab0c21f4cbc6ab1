"""Whose slice is it: ids before guesses, and guesses that must earn a patient split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from utils.commands.prepare import main
from utils.data.neighbours import components, pooled_features, similar_pairs, weakest_links
from utils.data.patient_evidence import confirmed, shifted_heads, weigh, witness
from utils.data.phantom import PhantomConfig, make_phantoms
from utils.data.preparation import group_by_subject, patients_note, prepare_dataset, split_and_save, splits_in_memory
from utils.data.raw_images import RawImages
from utils.data.sets import MANIFEST_COLUMNS, data_note, load_manifest, load_splits, protocol_name
from utils.data.subject_ids import UNKNOWN, converted, find_ids, read_subjects_csv
from utils.data.subjects import _seriate, find_subjects, find_synthetic
from utils.data.workspace import Workspace
from utils.evaluation.leak_audit import audit, audit_splits, audit_table
from utils.reporting.leak import save_audit


@pytest.fixture(scope="module")
def full_stacks() -> RawImages:
    """Twelve people with every slice, whose file names say nothing of them."""
    raw = make_phantoms(PhantomConfig(n_subjects=12, n_levels=32, seed=5))
    names = [f"{raw.classes[label]}/x{number:04d}.png" for number, label in enumerate(raw.labels)]
    return replace(raw, subjects=None, paths=names, name="unnamed", folders=[""] * len(raw), info={})


def _thinned(raw: RawImages, keep: int) -> RawImages:
    chosen = np.arange(0, len(raw), keep)
    return replace(
        raw,
        pixels=raw.pixels[chosen],
        labels=raw.labels[chosen],
        paths=[raw.paths[i] for i in chosen],
        folders=[raw.folders[i] for i in chosen],
    )


# --- ids that the source gives


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (
            ["Non/OAS1_0028_MR1_mpr-1_100.jpg", "Non/OAS1_0028_MR2_mpr-3_7.jpg", "Mild/OAS1_0029_MR1_1.jpg"],
            [0, 0, 1],
        ),
        (["AD/ADNI_002_S_0295_MR_1.png", "AD/002_S_0296/a.png", "CN/x/002_S_0295_b.png"], [0, 1, 0]),
        (["CN/sub-OAS30001/anat/sub-OAS30001_T1w_3.png", "AD/sub-OAS30002_1.png", "AD/sub-OAS30002_2.png"], [0, 1, 1]),
        (["a/sub-01_ses-1_1.png", "a/sub-01_ses-2_1.png", "b/sub-2x_1.png"], [0, 0, 1]),
        (["a\\Patient 7\\1.png", "b\\Patient 8\\1.png", "b\\Patient 8\\2.png"], [0, 1, 1]),
        (["a/IXI012-HH-1211.png", "a/IXI012-HH-1212.png", "b/IXI013-X.png"], [0, 0, 1]),
    ],
)
def test_ids_in_names_and_folders_are_read(paths: list[str], expected: list[int]) -> None:
    found = find_ids(paths, [0] * len(paths), {"AD", "CN", "Non", "Mild", "a", "b"})
    assert found is not None and found.subject.tolist() == expected and not found.guessed


def test_one_folder_a_patient_below_its_class() -> None:
    paths = [
        f"top/{side}/{name}/{who}/{n}.png"
        for side in ("train", "test")
        for name, who in (("AD", "smith"), ("AD", "jones"), ("CN", "wu"), ("CN", "ng"), ("CN", "diaz"))
        for n in range(2)
    ]
    labels = [int("/CN/" in path) for path in paths]
    found = find_ids(paths, labels, {"AD", "CN", "train", "test"})
    assert found is not None and "folder" in found.origin and len(set(found.subject.tolist())) == 5
    # the same person on both published sides is one patient
    assert found.subject[:10].tolist() == found.subject[10:].tolist()


def test_folders_of_kinds_are_nobody_and_numbers_that_begin_anew_are_people() -> None:
    kinds = [f"{name}/{kind}/{n}.png" for name in "ab" for kind in ("axial", "coronal") for n in range(3)]
    looks = [f"{name}/{kind}/x.png" for name in "abc" for kind in ("bright", "dark", "noisy", "sharp")]
    numbers = [f"{name}/{who}/{n}.png" for name in "ab" for who in range(1, 5) for n in range(2)]
    assert find_ids(kinds, [path[0] == "b" for path in kinds], set("ab")) is None
    assert find_ids(looks, ["abc".index(path[0]) for path in looks], set("abc")) is None
    found = find_ids(numbers, [int(path[0] == "b") for path in numbers], set("ab"))
    assert found is not None and len(set(found.subject.tolist())) == 8


def test_an_id_is_a_word_and_two_of_them_are_none() -> None:
    assert find_ids(["a/1002_S_02951x.png"] * 4, [0] * 4, {"a"}) is None
    paths = [f"a/OAS1_000{n}_1.png" for n in range(1, 8)] + ["a/OAS1_0001_and_OAS1_0002.png"]
    found = find_ids(paths, [0] * 8, {"a"})
    assert found is not None and found.subject[-1] == UNKNOWN and found.unnamed == 1 and "left out" in found.notes[0]


def test_a_pattern_of_ones_own() -> None:
    paths = ["a/scan-K7-1.png", "a/scan-K7-2.png", "b/scan-M1-1.png"]
    found = find_ids(paths, [0, 0, 1], pattern=r"scan-(\w+)-")
    assert found is not None and found.subject.tolist() == [0, 0, 1]
    for pattern, said in ((r"scan-(", "no regular expression"), (r"K\d", "finds no patient in 1 of 3")):
        with pytest.raises(ValueError, match=said):
            find_ids(paths, [0, 0, 1], pattern=pattern)


@pytest.mark.parametrize(
    "rows",
    [
        ["path,subject", "Non\\p1.png,A", "Mild\\p2.png,B"],
        ["path,subject", "p1.png,A", "p2.png,B"],
        ["Image,Patient_ID", "./data/Non/p1.png,A", "./data/Mild/p2.png,B"],
    ],
)
def test_a_table_fits_with_backslashes_without_folders_and_with_more_of_them(rows: list[str], tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("\n".join(rows))
    assert read_subjects_csv(tmp_path / "s.csv", ["Non/p1.png", "Mild/p2.png"]).tolist() == [0, 1]


def test_a_table_that_could_mean_two_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("path,subject\na/p1.png,A\nb/p1.png,B\n")
    with pytest.raises(ValueError, match="could both mean p1.png"):
        read_subjects_csv(tmp_path / "s.csv", ["p1.png"])
    assert read_subjects_csv(tmp_path / "s.csv", ["b/p1.png"]).tolist() == [0]


def _numbered(raw: RawImages, people: np.ndarray) -> RawImages:
    names = [f"{raw.classes[y]}/scan {who} ({n}).png" for n, (y, who) in enumerate(zip(raw.labels, people))]
    return replace(raw, paths=names)


@pytest.mark.slow
def test_names_of_numbers_are_a_guess_that_pixels_confirm(full_stacks: RawImages) -> None:
    few, people = _thinned(full_stacks, 4), np.repeat(np.arange(12), 8)
    found = group_by_subject(_numbered(few, people))
    assert found.count == 12 and "confirmed by pixels" in found.origin
    assert len(set(zip(found.subject.tolist(), people.tolist()))) == 12
    scrambled = np.random.default_rng(0).permutation(people)
    assert group_by_subject(_numbered(few, scrambled)).origin == "pixels"
    assert confirmed(few.pixels, people) and not confirmed(few.pixels, scrambled)


def test_a_changed_diagnosis_keeps_one_side_and_is_said(full_stacks: RawImages, tmp_path: Path) -> None:
    labels = full_stacks.labels.copy()
    labels[:8] = (labels[:8] + 1) % 4  # eight of the first one's 32 slices were taken at another stage
    names = [f"{full_stacks.classes[y]}/OAS2_{n // 32:04d}_MR1_{n % 32}.png" for n, y in enumerate(labels)]
    raw = replace(full_stacks, labels=labels, paths=names)
    subjects = group_by_subject(raw)
    assert subjects.count == 12 and converted(subjects.subject, labels) == 1
    assert any("1 of 12 patients have images of several classes" in note for note in subjects.notes)
    assert not any("begin anew" in note for note in subjects.notes)
    splits = split_and_save(raw, subjects, out=tmp_path)
    assert len({name for name, part in splits if 0 in part.subjects}) == 1
    assert any("several classes" in note for note in load_splits(tmp_path).info["notes"])


def test_ids_that_begin_anew_in_each_class_are_said_to_be_no_people(full_stacks: RawImages) -> None:
    counted: dict[int, dict[int, int]] = {}
    names = []
    for n, label in enumerate(full_stacks.labels.tolist()):
        own = counted.setdefault(label, {})
        number = own.setdefault(n // 32, len(own))
        names.append(f"{full_stacks.classes[label]}/siteA_sub-{number:02d}_{n % 32}.png")
    subjects = group_by_subject(replace(full_stacks, paths=names))
    assert subjects.count < 12
    assert any("begin anew in each class" in note and "--subjects" in note for note in subjects.notes)


# --- guesses from pixels


def test_complete_stacks_earn_the_patient_split(full_stacks: RawImages, tmp_path: Path) -> None:
    subjects = group_by_subject(full_stacks)
    assert subjects.count == 12 and not subjects.doubts and not subjects.notes
    splits = split_and_save(full_stacks, subjects, out=tmp_path)
    facts = splits.info["patients"]
    assert (
        facts["verified"] and facts["from"] == "pixels" and facts["evidence"]["inside"] > facts["evidence"]["between"]
    )
    assert data_note(splits.info) == "" and protocol_name(splits.info) == "patient split"
    assert list(load_manifest(tmp_path / "manifest.csv").columns) == MANIFEST_COLUMNS


@pytest.mark.parametrize("keep", [4, 8])
def test_stacks_with_slices_missing_are_refused_with_reasons_and_ways_out(
    full_stacks: RawImages, keep: int, tmp_path: Path
) -> None:
    raw = _thinned(full_stacks, keep)
    subjects = group_by_subject(raw)
    assert subjects.doubts and patients_note(subjects) == "patients unverified"
    with pytest.raises(ValueError, match="--subjects CSV.*--accept-unverified-patients"):
        split_and_save(raw, subjects, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_accepted_doubt_travels_into_every_record_and_title(full_stacks: RawImages, tmp_path: Path) -> None:
    raw = _thinned(full_stacks, 8)
    split_and_save(raw, group_by_subject(raw), out=tmp_path, accept_unverified=True)
    splits = load_splits(tmp_path)
    facts = splits.info["patients"]
    assert not facts["verified"] and facts["doubts"] and any("unverified" in note for note in splits.info["notes"])
    assert "patients unverified" in protocol_name(splits.info)
    assert "patients unverified" in Workspace.open(str(tmp_path)).note(splits)
    manifest = load_manifest(tmp_path / "manifest.csv")
    assert set(manifest["note"]) == {"patient unverified"} and list(manifest.columns) == [*MANIFEST_COLUMNS, "note"]


@pytest.mark.slow
def test_the_same_heads_scanned_twice_are_found_in_each_other(full_stacks: RawImages) -> None:
    once = full_stacks.pixels
    again = np.stack([np.roll(image, (-3, 2), (0, 1)) for image in once])
    both = np.concatenate([once, again])
    groups = np.repeat(np.arange(24), 32)
    found, asked = shifted_heads(both, groups, np.tile(np.arange(32), 24))
    assert found == asked == 24 and shifted_heads(once, groups[:384], np.tile(np.arange(32), 12)) == (0, 12)
    # as one source whose groups are the 24 stacks, it is refused
    subjects = find_subjects(both, np.tile(full_stacks.labels, 2))
    assert subjects.count in (12, 24) and (subjects.count == 12 or "scanned or cut twice" in " ".join(subjects.doubts))


@pytest.mark.slow
@pytest.mark.parametrize("change", ["turned", "upside down", "mirrored", "half a turn", "enlarged"])
def test_copies_of_an_augmentation_are_found_and_refused(full_stacks: RawImages, change: str, tmp_path: Path) -> None:
    changes: dict[str, Callable[[Image.Image], Image.Image]] = {
        "turned": lambda image: image.rotate(8, Image.Resampling.BILINEAR),
        "upside down": ImageOps.flip,
        "mirrored": ImageOps.mirror,
        "half a turn": lambda image: image.rotate(180),
        "enlarged": lambda image: image.resize((142, 142)).crop((7, 7, 135, 135)),
    }
    copies = np.stack([np.asarray(changes[change](Image.fromarray(image))) for image in full_stacks.pixels])
    names = [f"{full_stacks.classes[y]}/copy{n:04d}.png" for n, y in enumerate(full_stacks.labels)]
    raw = replace(
        full_stacks,
        pixels=np.concatenate([full_stacks.pixels, copies]),
        labels=np.tile(full_stacks.labels, 2),
        paths=[*full_stacks.paths, *names],
        folders=[""] * 2 * len(full_stacks),
    )
    subjects = group_by_subject(raw)
    together = subjects.subject[: len(copies)] == subjects.subject[len(copies) :]
    assert together.all() or "copies of an augmentation" in " ".join(subjects.doubts)
    if not together.all():
        with pytest.raises(ValueError, match="--accept-unverified-patients"):
            split_and_save(raw, subjects, out=tmp_path)


@pytest.mark.slow
def test_a_nearest_neighbour_bears_witness_of_people_on_both_sides() -> None:
    raw = make_phantoms(PhantomConfig(n_subjects=64, n_levels=16, seed=2))
    people = np.repeat(np.arange(64), 16)
    # classes that say nothing of the image: whoever knows them has recognised somebody
    labels = np.random.default_rng(1).integers(0, 2, 64)[people]
    torn, given_away, _ = witness(raw.pixels, labels, 2 * people + np.arange(1024) % 2)
    whole, expected, n_people = witness(raw.pixels, labels, people)
    assert torn > 0.9 > given_away + 0.15 and whole < expected + 0.15 and n_people == 64


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "patients"), [(2, 6), (3, 6), (4, 5)])
def test_few_patients_whose_classes_say_nothing_are_not_doubted(classes: int, patients: int) -> None:
    raw = make_phantoms(PhantomConfig(n_subjects=32, n_levels=16, seed=2))
    pixels, count = raw.pixels.reshape(32, 16, *raw.pixels.shape[1:]), classes * patients
    people, order = np.repeat(np.arange(count), 16), np.tile(np.arange(16), count)
    for seed in range(4):
        draws = np.random.default_rng(seed)
        chosen = pixels[draws.permutation(32)[:count]].reshape(16 * count, *raw.pixels.shape[1:])
        labels = np.repeat(draws.permutation(np.repeat(np.arange(classes), patients)), 16)
        found = weigh(chosen, labels, people, order)
        assert not found.doubts and found.expected >= 1 / classes
        # the same heads under two names each are still found out
        torn = weigh(chosen, labels, 2 * people + order % 2, order)
        assert torn.nearest > found.nearest and torn.doubts


def test_the_audit_of_unverified_patients_does_not_ask_their_groups(full_stacks: RawImages) -> None:
    raw = _thinned(full_stacks, 8)
    splits = splits_in_memory(raw, group_by_subject(raw), "patient")
    (found,) = audit_splits(splits)
    assert found.same_patient is None and found.expected is not None and found.as_dict()["same_patient"] is None
    assert audit_table([found]).loc["patient", "nearest is the same patient"] == "patients unverified"


@pytest.mark.slow
def test_one_lit_pixel_in_a_corner_drops_nobody(full_stacks: RawImages) -> None:
    pixels = full_stacks.pixels.copy()
    pixels[::3, 0, 0] = 1
    raw = replace(full_stacks, pixels=pixels)
    for rule in ("auto", "corners", "none"):
        found = group_by_subject(raw, synthetic=rule)
        assert not found.synthetic.any() and found.count == 12
    with pytest.raises(ValueError, match="auto, corners, none"):
        group_by_subject(raw, synthetic="maybe")


def test_the_corner_rule_belongs_to_the_set_that_it_was_made_for(full_stacks: RawImages) -> None:
    pixels = full_stacks.pixels.copy()
    pixels[:96, :6, :6] = 9  # three of twelve people, scanned with a mark in the corner
    marked = replace(full_stacks, pixels=pixels)
    assert not group_by_subject(marked).synthetic.any()
    assert group_by_subject(marked, synthetic="corners").synthetic.sum() == 96 == find_synthetic(pixels)[0].sum()
    assert group_by_subject(replace(marked, name="best_alzheimer_mri")).synthetic.sum() == 96


def test_a_validation_folder_is_kept_and_sharing_is_said(full_stacks: RawImages, tmp_path: Path) -> None:
    sides = np.array(["train", "train", "validation", "test"])[np.arange(len(full_stacks)) % 4].tolist()
    raw = replace(full_stacks, folders=sides)
    splits = split_and_save(raw, group_by_subject(raw), split="published", out=tmp_path)
    assert [len(part) for _, part in splits] == [192, 96, 96]
    assert all((int(path[-8:-4]) % 4 == 2) for path in splits.validation.paths)
    assert splits.info["shared_patients"] == {"test": 12, "shared": 12}
    with pytest.raises(ValueError, match="validation folder of its own"):
        split_and_save(raw, group_by_subject(raw), split="published", out=tmp_path, ratios=(0.8, 0.2, 0.0))


def test_commands_refuse_accept_and_say_so(full_stacks: RawImages, tmp_path: Path, capsys) -> None:
    raw = _thinned(full_stacks, 8)
    for path, image in zip(raw.paths, raw.pixels):
        (tmp_path / "set" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "set" / path)
    command = ["--source", str(tmp_path / "set"), "--out", str(tmp_path / "out")]
    assert main(command) == 1
    assert "no patient split" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*command, "--accept-unverified-patients"]) == 0
    assert "Note: patients unverified" in capsys.readouterr().out
    rows = [f"{Path(path).name},{number // 4}" for number, path in enumerate(raw.paths)]
    (tmp_path / "s.csv").write_text("\n".join(["path,subject", *rows]))
    assert main([*command, "--subjects", str(tmp_path / "s.csv")]) == 0
    assert load_splits(tmp_path / "out").info["patients"]["from"] == "the table s.csv"


# --- what is there already


@pytest.mark.slow
def test_phantoms_replace_neither_real_images_nor_their_audit(full_stacks: RawImages, tmp_path: Path) -> None:
    subjects = group_by_subject(full_stacks)
    split_and_save(full_stacks, subjects, out=tmp_path / "data")
    with pytest.raises(FileExistsError, match="holds unnamed, which phantoms must not replace"):
        prepare_dataset("phantom", out=tmp_path / "data")
    found = audit(full_stacks, subjects, cross_validate=False)
    save_audit(found, tmp_path / "assets" / "Dataset")
    workspace = Workspace.open(str(tmp_path))
    assert (
        workspace.data_assets("unnamed").name == "Dataset"
        and workspace.data_assets("phantom").name == "Dataset_phantom"
    )
    with pytest.raises(FileExistsError, match="is the audit of unnamed"):
        save_audit(found | {"data": found["data"] | {"source": "phantom"}}, tmp_path / "assets" / "Dataset")


# --- large sets


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), threshold=st.sampled_from([0.3, 0.8, 0.95]))
def test_pairs_are_those_of_all_correlations(seed: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    heads = rng.integers(0, 255, (6, 1, 8, 8)).repeat(6, 1) + rng.normal(0, 25, (6, 6, 8, 8))
    pixels = heads.reshape(36, 8, 8).clip(0, 255).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    features = pooled_features(pixels)
    flipped = pooled_features(np.ascontiguousarray(pixels[:, :, ::-1]))
    every = np.triu(np.maximum(features @ features.T, features @ flipped.T), 1)
    sure = np.abs(every - threshold) > 1e-4
    found = np.zeros_like(every, dtype=bool)
    pairs = similar_pairs(pixels, threshold)
    found[pairs.rows, pairs.columns] = True
    assert np.array_equal(found[sure], (every > threshold)[sure])
    groups = components(pairs, 36)
    for group, weakest in enumerate(weakest_links(pairs, groups)):
        members = np.flatnonzero(groups == group)
        assert np.isnan(weakest) == (len(members) == 1)
        if len(members) > 1:
            parted = components(pairs.above(float(weakest) + 1e-6), 36)[members]
            assert weakest > threshold and len(np.unique(parted)) > 1


def test_a_giant_group_is_laid_along_its_main_axis_without_cubic_work() -> None:
    places = np.random.default_rng(0).permutation(1500)
    rows = places[:, None, None] / 100 + np.arange(64)[None, :, None]
    images = (127 + 120 * np.sin(rows / 20) * np.ones((1, 1, 64))).astype(np.uint8)
    order = _seriate(pooled_features(images))
    assert abs(np.corrcoef(places[order], np.arange(1500))[0, 1]) > 0.99


def test_a_raw_set_without_any_image_of_somebody_is_an_error(full_stacks: RawImages, tmp_path: Path) -> None:
    nobody = replace(full_stacks, subjects=np.full(len(full_stacks), UNKNOWN))
    with pytest.raises(ValueError, match="too few patients"):
        split_and_save(nobody, group_by_subject(nobody), out=tmp_path)
