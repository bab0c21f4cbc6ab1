"""What attacks and loaders are given by others: each wrong thing is called by its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.def_models import build_model
from models.weight_files import read_weights_file
from models.weight_loading import load_weights
from tests.toy import EPS, HalfSpace, toy_images
from utils.attacks.attack import Attack, known_attacks
from utils.attacks.gradient import fgsm, pgd
from utils.commands import robustness
from utils.core.checks import LARGEST_SEED
from utils.data.preparation import prepare_dataset
from utils.experiments.fit import fit
from utils.training.config import TrainConfig


class _Answers(nn.Module):
    """Gives its logits in some other form."""

    def __init__(self, form: type) -> None:
        super().__init__()
        self.inner, self.form = HalfSpace(), form

    def forward(self, images: torch.Tensor) -> object:
        logits = self.inner(images)
        return {"logits": logits} if self.form is dict else (logits, logits)


def _batch(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    images = toy_images(8, seed=0)
    return images.pixels(slice(0, count)), torch.zeros(count, dtype=torch.long)


def _attack(name: str) -> Attack:
    options = {"ifgsm_t": {"target": "least_likely"}, "pgd_t": {"target": "least_likely"}, "region": {"part": "brain"}}
    return Attack(name, steps=2, options=options.get(name, {}))


#: Ways in which each kind is given a batch; what is fitted first, tied, or a vote's is given something else.
KINDS = [name for name in known_attacks() if name not in ("universal", "linked", "reweighed", "autoattack")]


@pytest.mark.parametrize("name", [name for name in KINDS if name != "noise"])
@pytest.mark.parametrize("form", [tuple, dict])
def test_a_model_that_gives_more_than_logits_is_refused(name: str, form: type) -> None:
    norm = "linf" if "linf" in _attack(name).kind.norms else "l2"
    if _attack(name).kind.norms == ("l0",):
        norm = "l0"
    with pytest.raises(TypeError, match=f"one tensor of logits, not a {form.__name__}: wrap it"):
        _attack(name)(_Answers(form), *_batch(), eps=2.0 if norm == "l0" else EPS, norm=norm)


@pytest.mark.parametrize("name", KINDS)
def test_an_empty_batch_comes_back_empty(name: str) -> None:
    kinds = _attack(name).kind.norms
    norm = "linf" if "linf" in kinds else kinds[0]
    images, labels = _batch(0)
    found = _attack(name)(HalfSpace(), images, labels, eps=2.0 if norm == "l0" else EPS, norm=norm)
    assert found.shape == images.shape


@pytest.mark.parametrize("name", ["square", "Square", "BIM", "FAB", "APGD", "OnePixel"])
def test_a_model_without_parameters_is_attacked_by_the_library_too(name: str) -> None:
    kind = _attack(name).kind
    norm = "linf" if "linf" in kind.norms else "l0"
    images, labels = _batch()
    found = _attack(name)(HalfSpace(), images, labels, eps=2.0 if norm == "l0" else EPS, norm=norm)
    assert found.shape == images.shape and found.min() >= 0 and found.max() <= 1


def test_what_is_no_model_no_tensor_and_no_loss_is_called_so() -> None:
    images, labels = _batch()
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module .* not a function"):
        fgsm(lambda batch: batch.mean((2, 3)), images, labels, eps=EPS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be tensors, not ndarray and Tensor"):
        pgd(HalfSpace(), images.numpy(), labels, eps=EPS)  # type: ignore[arg-type]
    for attack in (fgsm, pgd):
        with pytest.raises(ValueError, match="loss must be one of .*, not 'foo'"):
            attack(HalfSpace(), images, labels, eps=EPS, loss="foo")


class _Cut(nn.Module):
    """A model whose answers do not tell how its images should change."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return HalfSpace()(images.detach()) + 0 * images.sum()


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_a_model_without_an_input_gradient_is_said_to_be_so(attack) -> None:
    images, labels = _batch()
    with pytest.warns(UserWarning, match="no input gradient .* no robustness"):
        attack(_Cut(), images, labels, eps=EPS)


class _Scaled(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 100 * HalfSpace()(images).softmax(1)


def test_probabilities_in_percent_are_probabilities_too() -> None:
    images, labels = _batch()
    with pytest.raises(ValueError, match="the model gives probabilities"):
        pgd(_Scaled(), images, labels, eps=EPS)


def test_a_radius_may_be_a_number_of_numpy() -> None:
    images, labels = _batch()
    for eps in (np.float32(0.1), np.float64(0.1)):
        assert (fgsm(HalfSpace(), images, labels, eps=eps) - images).abs().max() <= 0.1 + 1e-6


# --- weights --------------------------------------------------------------------------------------------------------


def _state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        name: value.contiguous().clone(memory_format=torch.contiguous_format)
        for name, value in build_model("resnet34", image_size=32).state_dict().items()
    }


FIRST = "backbone.conv1.weight"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (FIRST, lambda value: value * torch.nan, f"{FIRST} holds NaN or infinite values"),
        (FIRST, lambda value: value / 0, f"{FIRST} holds NaN or infinite values"),
        ("backbone.bn1.running_var", lambda value: value - 5, "running_var holds a variance of -4"),
        (FIRST, lambda value: value.to(torch.complex64), f"{FIRST} is complex"),
        (FIRST, lambda value: value.to_sparse(), f"{FIRST} is sparse"),
        (FIRST, lambda value: value.to("meta"), f"{FIRST} has no values"),
        (FIRST, lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), f"{FIRST} is quantised"),
        (FIRST, lambda value: (value * 100).to(torch.int8), "conv1.weight are whole numbers"),
        ("std", torch.zeros_like, "holds a std of"),
    ],
)
def test_tensors_that_no_layer_computes_with_are_named(name: str, change, said: str, tmp_path: Path) -> None:
    state = _state()
    state[name] = change(state[name])
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt") as raised:
        load_weights(build_model("resnet34", image_size=32), tmp_path / "weights.pt")
    assert said in str(raised.value)


def test_a_file_is_what_its_content_says_and_not_its_name(tmp_path: Path) -> None:
    state = _state()
    for name in ("weights.pt", "weights.bin", "weights.SAFETENSORS"):
        save_file(state, tmp_path / name)
        assert set(read_weights_file(tmp_path / name).tensors) == set(state)
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "words.pth").write_text("not a file of tensors")
    torch.save(nn.Linear(2, 2), tmp_path / "object.pth")
    for name in ("empty.pth", "words.pth", "object.pth"):
        with pytest.raises(ValueError, match=name) as raised:
            read_weights_file(tmp_path / name)
        assert "weights_only=False" not in str(raised.value)  # nobody is told to execute what a file says


def test_weights_beside_those_that_were_taken_are_said(tmp_path: Path) -> None:
    state = _state()
    classes = {"idx_to_class": {0: "Non", 1: "VeryMild", 2: "Mild", 3: "Moderate"}}
    torch.save({"model": state, "model_ema": state, **classes}, tmp_path / "both.pt")
    loaded = load_weights(build_model("resnet34", image_size=32), tmp_path / "both.pt")
    assert "also holds model_ema, which was not taken" in str(loaded)
    assert read_weights_file(tmp_path / "both.pt").classes == ["Non", "VeryMild", "Mild", "Moderate"]


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"augmentation": 3}, "augmentation must be an Augmentation, not 3"),
        ({"learning_rate": 1e30}, "learning_rate must be a number above 0 and at most 10"),
        ({"seed": LARGEST_SEED + 1}, "seed must be a whole number from 0 to 4294967295"),
    ],
)
def test_settings_that_would_fail_later_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"steps": True}, "steps must be a whole number"),
        ({"restarts": 0}, "restarts must be a whole number"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
    ],
)
def test_counts_of_an_attack_are_whole(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pgd(HalfSpace(), *_batch(), eps=EPS, **settings)


@pytest.mark.parametrize(
    ("settings", "said"), [({"seed": -1}, "seed must be a"), ({"size": 64.5}, "size must be a whole number")]
)
def test_what_a_preparation_cannot_take_is_said_before_any_image_is_read(settings: dict, said: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=said):
        prepare_dataset(tmp_path / "nothing", out=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_changes_of_the_images_are_no_setting_by_themselves(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="training has no setting augmentation"):
        fit("resnet34", tmp_path, tmp_path / "out", settings={"augmentation": 3})


@pytest.mark.parametrize("words", [["--epsilons"], ["--epsilons", "--suite", "quick"]])
def test_a_list_without_entries_is_not_the_default(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert robustness.main(["--model", "ResNet34", *words]) == 1
    assert "--epsilons needs at least one value" in capsys.readouterr().err
