"""Weights in the layouts in which people have them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model
from torchvision.ops import SqueezeExcitation

from models.def_models import BACKBONES, MRIClassifier, build_model
from models.weight_loading import load_weights, read_weights

IMAGES = torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(0))


def _randomised(net: nn.Module) -> nn.Module:
    """Other numbers in every tensor, so that nothing passes by being at its default."""
    generator = torch.Generator().manual_seed(1)
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.copy_(value * (1 + 0.1 * torch.rand(value.shape, generator=generator)) + 1e-3)
    return net.eval()


def _wrapped(state: dict, wrapper: str) -> dict:
    """The same tensors as a training script may have saved them."""
    match wrapper:
        case "plain":
            return state
        case "module":
            return {f"module.{key}": value for key, value in state.items()}
        case "compiled":
            return {f"_orig_mod.{key}": value for key, value in state.items()}
        case "lightning":
            return {"state_dict": {f"model.net.{key}": value for key, value in state.items()}, "epoch": 3}
        case "both":
            return {"model": {f"module._orig_mod.{key}": value for key, value in state.items()}, "optimizer": {"a": 1}}
        case "backbone":
            return {f"backbone.{key}": value for key, value in state.items()}


WRAPPERS = ["plain", "module", "compiled", "lightning", "both", "backbone"]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_fine_tuned_torchvision_model_keeps_its_head(wrapper: str, tmp_path: Path, capsys) -> None:
    net = _randomised(get_model("resnet34", weights=None, num_classes=4))
    torch.save(_wrapped(net.state_dict(), wrapper), tmp_path / "tuned.pth")
    model = build_model("resnet34", image_size=40, weights=tmp_path / "tuned.pth").eval()
    assert torch.allclose(model(IMAGES), net(model.prepared(IMAGES)), atol=1e-5)
    said = capsys.readouterr().out
    assert "head kept" in said and "class" in said


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_our_own_classifier_comes_back_whole_from_any_wrapper(wrapper: str, tmp_path: Path) -> None:
    own = _randomised(build_model("efficientnet_b0", image_size=40, num_classes=3))
    torch.save(_wrapped(own.state_dict(), wrapper), tmp_path / "own.pt")
    model = build_model("efficientnet_b0", image_size=40, num_classes=3, weights=tmp_path / "own.pt").eval()
    assert torch.equal(model(IMAGES), own(IMAGES)) and torch.equal(model.mean, own.mean)


@pytest.mark.parametrize("classes", [4, 1000])
def test_timms_efficientnet_is_torchvisions_under_other_names(classes: int, tmp_path: Path, capsys) -> None:
    net = _randomised(timm.create_model("efficientnet_b0", num_classes=classes))
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, tmp_path / "timm.safetensors")
    model = build_model("efficientnet_b0", image_size=64, weights=tmp_path / "timm.safetensors").eval()
    prepared = model.prepared(IMAGES)
    features = model.backbone.avgpool(model.backbone.features(prepared)).flatten(1)
    assert torch.allclose(features, net.forward_head(net.forward_features(prepared), pre_logits=True), atol=1e-4)
    assert ("head kept" in capsys.readouterr().out) == (classes == 4)


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


def test_timms_resnet_and_a_body_without_head(tmp_path: Path) -> None:
    net = _randomised(timm.create_model("resnet34", num_classes=0))
    torch.save(net.state_dict(), tmp_path / "body.pth")
    model = build_model("resnet34", image_size=64, weights=tmp_path / "body.pth").eval()
    prepared = model.prepared(IMAGES)
    body = nn.Sequential(*list(model.backbone.children())[:-1])
    assert torch.allclose(body(prepared).flatten(1), net(prepared), atol=1e-4)


def _dino(side: int = 42) -> nn.Module:
    return _randomised(timm.create_model("vit_small_patch14_dinov2.lvd142m", num_classes=0, img_size=side))


def _facebook(state: dict) -> dict:
    return state | {"mask_token": torch.zeros(1, 384)}


def _chunked(state: dict) -> dict:
    """Blocks in chunks, as in the checkpoints that Facebook's training writes."""
    names = {key: key.split(".") for key in state}
    return {
        ".".join(["blocks", str(int(parts[1]) // 3), *parts[1:]]) if parts[0] == "blocks" else key: state[key]
        for key, parts in names.items()
    }


@pytest.mark.parametrize(
    ("layout", "left"),
    [
        (lambda s: s, ""),
        (_facebook, "mask_token"),
        (lambda s: {"model": _facebook(s)}, "mask_token"),
        (
            lambda s: {
                "teacher": {f"backbone.{k}": v for k, v in _chunked(_facebook(s)).items()}
                | {"dino_head.mlp.0.weight": torch.zeros(2, 2)},
                "student": {"nothing": torch.zeros(1)},
            },
            "dino_head",
        ),
        (
            lambda s: (
                {f"pretrained.{k}": v for k, v in _facebook(s).items()}
                | {"depth_head.projects.0.weight": torch.zeros(2, 2)}
            ),
            "depth_head",
        ),
        (lambda s: {f"module.backbone.{k}": v for k, v in s.items()}, ""),
    ],
    ids=["timm", "facebook", "model", "teacher", "depth-anything", "module.backbone"],
)
def test_dinov2_as_published(layout, left: str, tmp_path: Path, capsys) -> None:
    net = _dino()
    torch.save(layout(net.state_dict()), tmp_path / f"{left or 'dino'}.pth")
    model = build_model("dino_v2", image_size=42, weights=tmp_path / f"{left or 'dino'}.pth").eval()
    prepared = model.prepared(IMAGES)
    assert torch.allclose(model.backbone.forward_features(prepared), net.forward_features(prepared), atol=1e-4)
    said = capsys.readouterr().out
    assert "head new" in said and left in said


@pytest.mark.slow
def test_positions_of_another_grid_are_resampled_and_registers_refused(tmp_path: Path) -> None:
    torch.save(
        {"teacher": {f"backbone.{k}": v for k, v in _facebook(_dino(70).state_dict()).items()}}, tmp_path / "a.pth"
    )
    assert build_model("dino_v2", image_size=42, weights=tmp_path / "a.pth").backbone.pos_embed.shape == (1, 10, 384)
    torch.save(_dino().state_dict() | {"register_tokens": torch.zeros(1, 4, 384)}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="it has register_tokens"):
        build_model("dino_v2", image_size=42, weights=tmp_path / "b.pth")


@pytest.mark.parametrize("shape", [(1, 9, 384), (1, 13, 384), (1, 14, 384), (2, 10, 384), (10, 384), (1, 1, 384)])
def test_positions_that_are_no_class_token_and_square_are_named(shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.save(_dino().state_dict() | {"pos_embed": torch.zeros(shape)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"its pos_embed {re.escape(str(shape))} is no class token before a square"):
        build_model("dino_v2", image_size=42, weights=tmp_path / "a.pth")


def test_names_of_hugging_face_are_called_so(tmp_path: Path) -> None:
    layer = "encoder.layer.0.attention.attention.query.weight"
    torch.save({"embeddings.cls_token": torch.zeros(1, 1, 384), layer: torch.zeros(384, 384)}, tmp_path / "hf.pth")
    with pytest.raises(ValueError, match="its names are Hugging Face's; take the weights under the names of timm"):
        build_model("dino_v2", image_size=42, weights=tmp_path / "hf.pth")


@pytest.mark.parametrize("where", ["record", "header"])
def test_another_order_of_classes_is_refused(where: str, tmp_path: Path) -> None:
    own = build_model("resnet34", image_size=32)
    path = tmp_path / "weights.safetensors"
    order = ["Mild", "Moderate", "Non", "VeryMild"]
    header = {"model": json.dumps({"backbone": "resnet34", "classes": order})} if where == "header" else None
    save_file({key: value.contiguous() for key, value in own.state_dict().items()}, path, metadata=header)
    if where == "record":
        (tmp_path / "record.json").write_text(json.dumps({"classes": order}))
    with pytest.raises(ValueError, match="Mild, Moderate, Non, VeryMild, in this order"):
        build_model("resnet34", image_size=32, weights=path, classes=["Non", "VeryMild", "Mild", "Moderate"])
    load_weights(MRIClassifier("resnet34", image_size=32), path, classes=order)


def test_a_head_of_another_shape_is_left_out_and_said(tmp_path: Path, capsys) -> None:
    torch.save({"state_dict": _randomised(get_model("resnet34", weights=None)).state_dict()}, tmp_path / "imagenet.pth")
    build_model("resnet34", image_size=32, weights=tmp_path / "imagenet.pth")
    assert "head new" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["resnet50", "mobilenet_v2", "resnet18"])
def test_another_network_is_refused_by_name(other: str, tmp_path: Path) -> None:
    torch.save(get_model(other, weights=None).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not fit resnet34"):
        build_model("resnet34", image_size=32, weights=tmp_path / "other.pth")


def test_a_deeper_transformer_is_no_shorter_one(tmp_path: Path) -> None:
    state = _dino().state_dict()
    torch.save(state | {"blocks.12.norm1.weight": state["blocks.11.norm1.weight"]}, tmp_path / "deep.pth")
    with pytest.raises(ValueError, match="unknown \\['blocks.12.norm1.weight'\\]"):
        build_model("dino_v2", image_size=42, weights=tmp_path / "deep.pth")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], {"state_dict": {}}, {"state_dict": {"epoch": 1}}])
def test_files_without_tensors_are_named(content, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"none.pt holds no plain named tensors"):
        read_weights(tmp_path / "none.pt")


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": {"fc.weight": Evil()}}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="no plain named tensors"):
        build_model("resnet34", weights=tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists() and "resnet34" in BACKBONES
