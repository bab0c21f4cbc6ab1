"""Two modalities of the same patients: matched by name, refused where one leaks into the other, fused by patient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_model

from tests.toy import toy_images
from utils.data.phantom import PhantomConfig, make_phantoms
from utils.data.preparation import group_by_subject, splits_in_memory
from utils.data.sets import DataSplits, ImageSet
from utils.data.sources import load_source
from utils.evaluation.ensemble import Vote
from utils.evaluation.fusion import fuse, patient_names, refuse_leak
from utils.evaluation.metrics import predict
from utils.experiments import modalities
from utils.experiments.modalities import FIRST, SECOND, TOGETHER, fusion_table, late_fusion
from utils.training.config import TrainConfig
from utils.training.loop import train


def _named(images: ImageSet, names: list[str]) -> ImageSet:
    return replace(
        images, paths=[f"{names[int(subject)]}/{path}" for subject, path in zip(images.subjects, images.paths)]
    )


@pytest.fixture(scope="module")
def both() -> dict[str, DataSplits]:
    config = PhantomConfig(n_subjects=24, n_levels=4, difficulty=1.0)
    raws = {name: make_phantoms(replace(config, contrast=name)) for name in ("T1", "T2")}
    return {name: splits_in_memory(raw, group_by_subject(raw), "patient") for name, raw in raws.items()}


@pytest.mark.slow
def test_the_second_contrast_shows_the_same_heads_with_bright_fluid(both) -> None:
    one, other = both["T1"].test, both["T2"].test
    assert one.paths == other.paths and torch.equal(one.labels, other.labels)
    first, second = (images.images[:, 0].float() for images in (one, other))
    brain = first > 0
    assert torch.equal(brain, second > 0)
    # dark in one is bright in the other
    fluid, white = brain & (first < 60), brain & (first > 180)
    assert second[fluid].mean() > second[white].mean() + 60
    assert load_source("phantom-t2", size=32).info["phantom"]["contrast"] == "T2"
    with pytest.raises(ValueError, match="contrast must be one of T1, T2"):
        PhantomConfig(contrast="FLAIR")


def test_patients_are_matched_by_ids_or_else_by_paths() -> None:
    images = toy_images(32, seed=0)
    ids = [f"sub-{10 + number}" for number in range(4)]
    assert patient_names(_named(images, ids)) == dict(enumerate(ids))
    assert patient_names(images)[1] == "10.png"
    twice = _named(images, ["sub-1", "sub-1", "sub-2", "sub-3"])
    with pytest.raises(ValueError, match="two patients are called sub-1"):
        patient_names(twice)


def test_the_fused_answer_is_the_mean_of_patients_whatever_their_order_and_number() -> None:
    images = toy_images(32, seed=0)
    ids = ["sub-a1", "sub-a2", "sub-a3", "sub-a4"]
    one = _named(images, ids)
    # the other modality has three of the four patients, numbered the other way round
    kept = torch.nonzero(images.subjects != 2)[:, 0]
    few = one.subset(kept)
    other = replace(few, subjects=3 - few.subjects, paths=[f"flair/{path}" for path in few.paths])
    draws = torch.Generator().manual_seed(0)
    first, second = torch.randn(32, 4, generator=draws), torch.randn(24, 4, generator=draws)
    found = fuse({"T1": (first, one), "FLAIR": (second, other)})
    assert found.names == ["sub-a1", "sub-a2", "sub-a4"] and found.left_out == 1
    alone = first.softmax(1)[24:].mean(0)
    also = second.softmax(1)[16:].mean(0)
    torch.testing.assert_close(found.probabilities[2], (alone + also) / 2)
    assert found.labels.tolist() == [0, 1, 3]


def test_what_cannot_be_fused_is_refused_by_name() -> None:
    images, logits = toy_images(32, seed=0), torch.zeros(32, 4)
    ids = ["sub-a1", "sub-a2", "sub-a3", "sub-a4"]
    one = _named(images, ids)
    with pytest.raises(ValueError, match="at least two modalities"):
        fuse({"T1": (logits, one)})
    with pytest.raises(ValueError, match="other classes"):
        fuse({"T1": (logits, one), "T2": (logits, replace(one, classes=["a", "b", "c", "d"]))})
    with pytest.raises(ValueError, match="no patient is in all"):
        fuse({"T1": (logits, one), "T2": (logits, _named(images, [f"sub-b{number}" for number in range(4)]))})
    wrong = replace(one, labels=(one.labels + 1) % 4)
    with pytest.raises(ValueError, match="sub-a1 is Non in T1, VeryMild in T2"):
        fuse({"T1": (logits, one), "T2": (logits, wrong)})


def test_a_patient_may_not_be_tested_in_one_and_trained_on_in_the_other(both) -> None:
    refuse_leak(both)
    turned = replace(both["T2"], train=both["T2"].test, test=both["T2"].train)
    with pytest.raises(ValueError, match=r"is tested in T2 and known to the models of T1: split both alike"):
        refuse_leak({"T1": both["T1"], "T2": turned})


@pytest.mark.usefixtures("small_backbone")
def test_two_contrasts_of_phantoms_are_fused(both, tmp_path: Path, monkeypatch) -> None:
    votes = {}
    for name, splits in both.items():
        model = small_model()
        train(model, splits, config=TrainConfig(num_epochs=4, batch_size=8, learning_rate=3e-3))
        votes[name] = Vote([model]).eval()
    monkeypatch.setattr(modalities, "load_splits", lambda _: both["T2"])
    monkeypatch.setattr(modalities, "trained_models", lambda _: {"Small_atk": None})
    monkeypatch.setattr(modalities, "load_members", lambda *_, **__: {"Small_atk": votes["T2"].members[0]})
    table = late_fusion(both["T1"], votes["T1"], str(tmp_path))
    assert list(table.index) == [FIRST, SECOND, TOGETHER] and set(table["patients"]) == {
        str(len(both["T1"].test.subjects.unique()))
    }
    logits = predict(votes["T1"], both["T1"].test), predict(votes["T2"], both["T2"].test)
    found = fuse({FIRST: (logits[0], both["T1"].test), SECOND: (logits[1], both["T2"].test)})
    ill = 1 - found.probabilities[:, 0]
    right = np.mean((ill > 0.5).numpy() == (found.labels != 0).numpy())
    assert table.loc[TOGETHER, "accuracy"].startswith(f"{100 * right:.1f} ")
    assert table.equals(fusion_table(found, both["T1"].classes))
    assert late_fusion(both["T1"], votes["T1"], "").startswith("one modality")
    monkeypatch.setattr(modalities, "trained_models", lambda _: {"Small": None})
    with pytest.raises(FileNotFoundError, match="no hardened models"):
        late_fusion(both["T1"], votes["T1"], str(tmp_path))
