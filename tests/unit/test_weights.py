"""Weights in the layouts in which people have them."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from conftest import small_model
from safetensors.torch import save_file
from torch import nn
from torchvision.ops import SqueezeExcitation

from models.def_models import build_model
from models.weight_loading import load_weights

CLASSES = ["mild", "moderate", "non", "very_mild"]
IMAGE = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))


def _resnet(num_classes: int = 4) -> nn.Module:
    torch.manual_seed(3)
    return torchvision.models.resnet34(num_classes=num_classes).eval()


def _randomised(net: nn.Module) -> nn.Module:
    """Other numbers in every tensor, so that nothing passes by being at its default."""
    generator = torch.Generator().manual_seed(1)
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.copy_(value * (1 + 0.1 * torch.rand(value.shape, generator=generator)) + 1e-3)
    return net.eval()


def _saved(content: object, folder: Path) -> Path:
    torch.save(content, folder / "weights.pth")
    return folder / "weights.pth"


def _load(path: Path, backbone: str = "resnet34", **options) -> tuple[nn.Module, str]:
    said: list[str] = []
    model = build_model(backbone, image_size=64, weights=path, say=said.append, **options).eval()
    assert len(said) == 1
    return model, said[0]


def _prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": _prefixed(state, "module."), "optimizer": {"lr": 0.1}, "args": argparse.Namespace(a=1)},
        lambda state: {"model_state_dict": _prefixed(state, "_orig_mod.")},
        lambda state: {"student": {"x": torch.zeros(1)}, "teacher": _prefixed(state, "backbone.")},
        lambda state: {"student": _prefixed(state, "module.backbone.")},
        lambda state: {"state_dict": _prefixed(state, "model.")},
        lambda state: _prefixed(state, "module._orig_mod.backbone.") | {"n_averaged": torch.tensor(5)},
        lambda state: {"model": _prefixed(state, "teacher.backbone.") | _prefixed(state, "student.backbone.")},
    ],
)
def test_a_fine_tuned_torchvision_classifier_keeps_its_answers(wrap: Callable, tmp_path: Path) -> None:
    net = _resnet()
    model, said = _load(_saved(wrap(net.state_dict()), tmp_path))
    assert torch.equal(model.backbone.fc.weight, net.fc.weight) and "head kept" in said
    assert torch.equal(model(IMAGE), net(model.prepared(IMAGE)))
    assert "unchecked" in said


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_our_own_classifier_loads_through_any_wrapper(prefix: str, tmp_path: Path) -> None:
    own = _randomised(build_model("resnet34", image_size=64))
    own.mean.fill_(0.25)
    model, said = _load(_saved({"model": _prefixed(own.state_dict(), prefix)}, tmp_path))
    assert torch.equal(model(IMAGE), own(IMAGE)) and model.mean.eq(0.25).all() and "head kept" in said


def test_a_head_of_another_shape_is_left_out_and_said(tmp_path: Path) -> None:
    net = _resnet(7)
    model, said = _load(_saved(net.state_dict(), tmp_path))
    assert model.backbone.fc.weight.shape == (4, 512) and torch.equal(model.backbone.conv1.weight, net.conv1.weight)
    assert "left out: fc.weight, fc.bias" in said and "new (random): fc.weight, fc.bias" in said
    body = {name: value for name, value in net.state_dict().items() if not name.startswith("fc.")}
    assert "new (random): fc.weight" in _load(_saved(body, tmp_path))[1]


def test_a_linear_layer_behind_a_dropout_is_the_same_head(tmp_path: Path) -> None:
    net = _resnet()
    net.fc = nn.Sequential(nn.Dropout(0.2), nn.Linear(512, 4))
    model, said = _load(_saved(net.eval().state_dict(), tmp_path))
    assert torch.equal(model(IMAGE), net(model.prepared(IMAGE))) and "head kept" in said


@pytest.mark.parametrize("name, classes", [("resnet34", 4), ("efficientnet_b0", 4), ("efficientnet_b0", 1000)])
def test_timm_classifiers_keep_their_answers(name: str, classes: int, tmp_path: Path) -> None:
    net = _randomised(timm.create_model(name, num_classes=classes))
    save_file(net.state_dict(), tmp_path / "model.safetensors", metadata={"model": name, "format": "pt"})
    model, said = _load(tmp_path / "model.safetensors", name)
    prepared = model.prepared(IMAGE)
    body = nn.Sequential(*list(model.backbone.children())[:-1])
    features = net.forward_head(net.forward_features(prepared), pre_logits=True)
    torch.testing.assert_close(body(prepared).flatten(1), features, rtol=1e-4, atol=1e-4)
    assert ("head kept" in said) == (classes == 4)
    if classes == 4:
        torch.testing.assert_close(model(IMAGE), net(prepared), rtol=1e-4, atol=1e-4)


def test_lite0_gives_all_its_layers_and_gates_begin_open(tmp_path: Path, capsys) -> None:
    net = _randomised(timm.create_model("tf_efficientnet_lite0"))
    torch.save(net.state_dict(), tmp_path / "lite0.pth")
    model = build_model("efficientnet_b0", image_size=64, weights=tmp_path / "lite0.pth", say=print).eval()
    said = capsys.readouterr().out
    assert "64 tensors that the file does not hold begin without effect" in said and "head new" in said
    convolutions = [part.weight for part in net.modules() if isinstance(part, nn.Conv2d)]
    gates = [part for part in model.modules() if isinstance(part, SqueezeExcitation)]
    squeezed = [part for gate in gates for part in (gate.fc1.weight, gate.fc2.weight)]
    own = [part.weight for part in model.modules() if isinstance(part, nn.Conv2d)]
    own = [weight for weight in own if all(weight is not other for other in squeezed)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(own, convolutions, strict=True))
    fitted = _randomised(timm.create_model("tf_efficientnet_lite0", num_classes=4))
    torch.save(fitted.state_dict(), tmp_path / "fitted.pth")
    build_model("efficientnet_b0", image_size=64, weights=tmp_path / "fitted.pth", classes=list("abcd"), say=print)
    assert "head new; left out: classifier" in capsys.readouterr().out
    seen = torch.randn(2, gates[0].fc1.in_channels, 4, 4)
    assert torch.allclose(gates[0](seen), seen, rtol=0.01)
    broken = {name: value for name, value in net.state_dict().items() if name != "blocks.1.0.conv_pw.weight"}
    torch.save(broken, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match="missing"):
        build_model("efficientnet_b0", image_size=64, weights=tmp_path / "broken.pth")


def _dinov2(image_size: int = 70) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    net = timm.create_model("vit_small_patch14_dinov2.lvd142m", num_classes=0, img_size=image_size)
    return {name: torch.randn_like(value) * 0.02 for name, value in net.state_dict().items()}


def _chunked(state: dict) -> dict:
    return {name.replace("blocks.", f"blocks.{int(name.split('.')[1]) // 3}.") if "blocks." in name else name: value for
            name, value in state.items()}  # fmt: skip


@pytest.mark.parametrize(
    "wrap, left",
    [
        (lambda state: state | {"mask_token": torch.zeros(1, 384)}, "mask_token"),
        (
            lambda state: {
                "teacher": _prefixed(state, "backbone.")
                | {"backbone.mask_token": torch.zeros(1, 384), "dino_head.last_layer.weight": torch.zeros(2, 2)}
            },
            "dino_head, mask_token",
        ),
        (lambda state: {"teacher": _prefixed(_chunked(state), "backbone.")}, ""),
        (
            lambda state: _prefixed(state, "pretrained.") | {"depth_head.projects.0.weight": torch.zeros(4)},
            "depth_head",
        ),
        (lambda state: state | {"head.weight": torch.zeros(4, 384), "head.bias": torch.zeros(4)}, "head.weight"),
    ],
)
def test_layouts_of_dinov2(wrap: Callable, left: str, tmp_path: Path) -> None:
    state = _dinov2()
    model, said = _load(_saved(wrap(state), tmp_path), "dino_v2")
    own = model.backbone.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state.items())
    assert (f"left out: {left}" in said) if left else ("left out" not in said)
    assert "head new" in said


@pytest.mark.slow
def test_dinov2_of_another_grid_is_resampled_and_registers_are_refused_by_name(tmp_path: Path) -> None:
    state = _dinov2(112)
    model, _ = _load(_saved(state, tmp_path), "dino_v2")
    assert model.backbone.pos_embed.shape == (1, 26, 384)
    for name in ("register_tokens", "reg_token"):
        with pytest.raises(ValueError, match=f"dino_v2.*{name}.*without registers"):
            _load(_saved(state | {name: torch.zeros(1, 4, 384)}, tmp_path), "dino_v2")


@pytest.mark.parametrize("shape", [(1, 9, 384), (1, 13, 384), (1, 14, 384), (2, 10, 384), (10, 384), (1, 1, 384)])
def test_positions_that_are_no_class_token_and_square_are_named(shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.save(_dinov2(42) | {"pos_embed": torch.zeros(shape)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"its pos_embed {re.escape(str(shape))} is no class token before a square"):
        build_model("dino_v2", image_size=42, weights=tmp_path / "a.pth")


def test_names_of_hugging_face_are_called_so(tmp_path: Path) -> None:
    layer = "encoder.layer.0.attention.attention.query.weight"
    torch.save({"embeddings.cls_token": torch.zeros(1, 1, 384), layer: torch.zeros(384, 384)}, tmp_path / "hf.pth")
    with pytest.raises(ValueError, match="its names are Hugging Face's; take the weights under the names of timm"):
        build_model("dino_v2", image_size=42, weights=tmp_path / "hf.pth")


@pytest.mark.parametrize("other", ["resnet50", "mobilenet_v2", "resnet18"])
def test_another_network_is_refused_by_name(other: str, tmp_path: Path) -> None:
    torch.save(torchvision.models.get_model(other, weights=None).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not fit resnet34"):
        build_model("resnet34", image_size=32, weights=tmp_path / "other.pth")


def test_a_deeper_transformer_is_no_shorter_one(tmp_path: Path) -> None:
    state = _dinov2(42)
    torch.save(state | {"blocks.12.norm1.weight": state["blocks.11.norm1.weight"]}, tmp_path / "deep.pth")
    with pytest.raises(ValueError, match="unknown \\['blocks.12.norm1.weight'\\]"):
        build_model("dino_v2", image_size=42, weights=tmp_path / "deep.pth")


@pytest.mark.parametrize(
    "content, words",
    [
        ({"model": {"stem.weight": torch.zeros(1)}}, r"resnet34.*missing \['conv1.weight'.*unknown \['stem.weight'\]"),
        ({"epoch": 3, "lr": 0.1}, "no plain named tensors.*epoch, lr.*state_dict"),
        ({}, "no plain named tensors"),
        ({"state_dict": {}}, "no plain named tensors"),
        ({"state_dict": {"epoch": 1}}, "no plain named tensors"),
        ([torch.zeros(1)], "no plain named tensors.*list"),
        (torch.zeros(1), "no plain named tensors.*Tensor"),
    ],
)
def test_what_is_no_known_layout_is_named(content: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        _load(_saved(content, tmp_path))
    assert "\n" not in str(caught.value)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    wrong = _resnet().state_dict() | {"bn1.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"of another shape \['bn1.bias \(3,\) instead of \(64,\)'\]"):
        _load(_saved(wrong, tmp_path))


def test_a_whole_pickled_model_is_not_executed(tmp_path: Path) -> None:
    path = _saved(_resnet(), tmp_path)
    with pytest.raises(
        ValueError, match=r"without executing code \(it is damaged, empty, or holds objects.*state_dict"
    ):
        _load(path)


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": {"fc.weight": Evil()}}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="no plain named tensors"):
        build_model("resnet34", weights=tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_two_models_under_one_name_are_refused(tmp_path: Path) -> None:
    state = _resnet().state_dict()
    with pytest.raises(ValueError, match="two tensors"):
        _load(_saved(_prefixed(state, "module.") | _prefixed(state, "model."), tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("told", ["classes", "class_names", "class_to_idx", "record.json", "header", "our header"])
def test_a_head_of_another_class_order_is_refused_naming_both(told: str, tmp_path: Path) -> None:
    state, other = _resnet().state_dict(), CLASSES[::-1]
    path = tmp_path / "weights.pth"
    if told.endswith("header"):
        path = tmp_path / "weights.safetensors"
        whose = {"classes": json.dumps(other)} if told == "header" else {"model": json.dumps({"classes": other})}
        save_file(state, path, metadata=whose)
    elif told == "record.json":
        _saved(state, tmp_path)
        (tmp_path / told).write_text(json.dumps({"classes": other}))
    else:
        index = {name: place for place, name in enumerate(other)}
        _saved({"state_dict": state, told: index if told == "class_to_idx" else other}, tmp_path)
    with pytest.raises(ValueError, match="very_mild, non, moderate, mild, in this order.*mild, moderate, non, very"):
        _load(path, classes=CLASSES)
    assert "unchecked" not in _load(path, classes=other)[1]
    assert "unchecked. The weights were trained with: very_mild, non" in _load(path)[1]


def test_class_order_does_not_matter_without_the_head(tmp_path: Path) -> None:
    path = _saved({"state_dict": _resnet(3).state_dict(), "classes": ["a", "b", "c"]}, tmp_path)
    assert "head new" in _load(path, classes=CLASSES)[1]


def test_as_many_classes_as_logits() -> None:
    with pytest.raises(ValueError, match="num_classes is 4, but there are 2 classes"):
        build_model("resnet34", classes=["a", "b"])


def test_a_folder_stands_for_the_weights_in_it(small_backbone: None, tmp_path: Path) -> None:
    own = small_model()
    save_file({name: value.contiguous() for name, value in own.state_dict().items()}, tmp_path / "weights.safetensors")
    other = small_model(seed=1)
    loaded = load_weights(other, tmp_path)
    assert torch.equal(other.backbone.out.weight, own.backbone.out.weight) and loaded.head == "kept"
