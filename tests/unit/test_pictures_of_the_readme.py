"""The animation of an attack, and the map of all slices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.toy import toy_images, train_toy
from utils.reporting.embedding import embed, embedding_figure, redraw_embedding, save_embedding
from utils.reporting.sweep import EPSILONS, frame, save_animation, sweep, turned_at


@pytest.mark.slow
def test_a_sweep_stays_in_its_radii_and_says_what_the_models_answer() -> None:
    models, image = {"Toy": train_toy(), "Toy_atk": train_toy(hardened=True)}, toy_images(8, seed=3)
    image = image.subset(torch.tensor([0]))
    found = sweep(models, image, EPSILONS[:9:4])
    for title, (images, probabilities) in found.items():
        assert ((images - image.pixels(slice(None))).abs().amax((1, 2, 3)) <= torch.tensor(EPSILONS[:9:4]) + 1e-6).all()
        assert torch.allclose(probabilities, models[title](images).softmax(1), atol=1e-5)
    options = {"label": int(image.labels[0]), "eps": EPSILONS[8], "attack": "PGD-20", "notes": ["a note"]}
    figure = frame(found, 2, image.classes, **options)
    answers = [image.classes[int(own[2].argmax())] for _, own in found.values()]
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[::2] == ["Toy", "Toy, hardened"] and [title.split(":")[0] for title in titles[1::2]] == answers
    assert "PGD-20 changes each pixel by at most 2/255" in figure.get_suptitle() and "a note" in figure.get_suptitle()


def test_an_animation_has_all_its_frames(tmp_path: Path) -> None:
    models, image = {"Toy": train_toy()}, toy_images(1, seed=3)
    found = sweep(models, image, EPSILONS[:3])
    options = {"label": 0, "attack": "FGSM", "notes": []}
    figures = [frame(found, step, image.classes, eps=EPSILONS[step], **options) for step in range(3)]
    with Image.open(save_animation(figures, tmp_path / "sweep.gif")) as animation:
        assert animation.n_frames == 3 and animation.info["loop"] == 0
    with pytest.raises(ValueError, match="one frame"):
        save_animation([], tmp_path / "sweep.gif")


def test_the_radius_from_which_answers_are_wrong_is_told() -> None:
    chances = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    assert turned_at(chances, 0, EPSILONS[:3]) == "misclassified from 0.5/255 on"
    assert turned_at(chances[:2], 0, EPSILONS[:2]) == "always right"


def test_slices_of_one_prototype_lie_together(tmp_path: Path) -> None:
    images = toy_images(96, seed=1)
    found = embed(images)
    places, labels = np.array(found.places), np.array(found.labels)
    distance = np.linalg.norm(places[:, None] - places[None], axis=-1) + 1e9 * np.eye(96)
    assert (labels[distance.argmin(1)] == labels).mean() > 0.9
    figure = embedding_figure(found)
    assert (
        len(figure.axes[1].lines) == len(set(found.subjects)) and f"{found.same_patient:.1%}" in figure.get_suptitle()
    )
    assert len(save_embedding(images, tmp_path).axes) == 2
    first = (tmp_path / "embedding.png").read_bytes()
    assert redraw_embedding(tmp_path / "embedding.json").read_bytes() == first
    few = images.subset(torch.tensor([0, 1]))
    assert save_embedding(few, tmp_path / "few") is None
    with pytest.raises(ValueError, match="at least three"):
        embed(few)


def test_of_many_slices_whole_patients_are_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.reporting.embedding._MOST", 30)
    found = embed(toy_images(96, seed=1))
    assert len(found.places) == 24 and len(set(found.subjects)) == 3


def test_where_patients_are_in_doubt_no_share_is_told_and_nobody_unknown_is_joined() -> None:
    images = toy_images(48, seed=1)
    unknown = replace(images, subjects=torch.where(images.subjects < 3, -1, images.subjects))
    found = embed(unknown)
    assert found.same_patient is not None and len(embedding_figure(found).axes[1].lines) == 3
    doubtful = replace(images, info=images.info | {"patients": {"verified": False}})
    found = embed(doubtful, note="patients unverified")
    title = embedding_figure(found).get_suptitle()
    assert found.same_patient is None and "same person" not in title and "patients unverified" in title
    nobody = embed(replace(images, subjects=torch.full_like(images.subjects, -1)))
    assert nobody.same_patient is None and not embedding_figure(nobody).axes[1].lines
