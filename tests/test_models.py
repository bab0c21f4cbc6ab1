from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models import def_models
from models.def_models import BACKBONES, Backbone, MRIClassifier, build_model
from utils.grad_cam import explain_rows, grad_cam, pick_layer
from utils.results import parameter_table


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
@pytest.mark.parametrize("shape", [(2, 1, 128, 128), (2, 3, 224, 224), (2, 1, 176, 208), (1, 1, 40, 40)])
def test_any_image_gives_logits(backbone: str, shape: tuple[int, ...]) -> None:
    model = build_model(backbone, num_classes=3, image_size=64).eval()
    assert model(torch.rand(shape)).shape == (shape[0], 3)


def test_grey_and_its_three_equal_channels_agree(resnet: nn.Module) -> None:
    grey = torch.rand(2, 1, 48, 48)
    assert torch.allclose(resnet(grey), resnet(grey.expand(-1, 3, -1, -1)), atol=1e-5)


def test_gradient_reaches_the_native_image(resnet: nn.Module) -> None:
    image = torch.rand(1, 1, 128, 128, requires_grad=True)
    resnet(image).sum().backward()
    assert image.grad.shape == image.shape and (image.grad != 0).float().mean() > 0.9


def test_normalisation_travels_with_the_weights(resnet: nn.Module) -> None:
    assert {"mean", "std"} <= set(resnet.state_dict())


@pytest.mark.parametrize(
    "trainable, frozen_parts", [("all", []), ("head", ["conv1", "layer4"]), (1, ["conv1", "layer3"]), (5, [])]
)
def test_freezing_by_requires_grad(trainable, frozen_parts) -> None:
    model = build_model("resnet34", image_size=32, trainable=trainable)
    for part in frozen_parts:
        assert not any(p.requires_grad for p in model.backbone.get_submodule(part).parameters())
    assert all(p.requires_grad for p in model.backbone.fc.parameters())
    assert (trainable in ("all", 5)) == all(p.requires_grad for p in model.parameters())
    table = parameter_table(model)
    assert table.loc["total"].sum() == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, abs=1e-2)


def test_frozen_batchnorm_keeps_its_statistics() -> None:
    model = build_model("resnet34", image_size=32, trainable="head").train()
    before = model.backbone.bn1.running_mean.clone()
    model(torch.rand(4, 1, 32, 32))
    assert torch.equal(before, model.backbone.bn1.running_mean) and not model.backbone.bn1.training
    assert model.freeze("all").train().backbone.bn1.training


@pytest.mark.parametrize("trainable", ["tail", 6, -1])
def test_bad_trainable(trainable) -> None:
    with pytest.raises(ValueError, match="trainable must be"):
        build_model("resnet34", trainable=trainable)


def test_bad_arguments_are_explained() -> None:
    with pytest.raises(ValueError, match="resnet34"):
        MRIClassifier("resnet18")
    with pytest.raises(ValueError, match="num_classes"):
        MRIClassifier("resnet34", num_classes=1)
    with pytest.raises(ValueError, match="image_size"):
        MRIClassifier("resnet34", image_size=16)
    with pytest.raises(ValueError, match="N x 1 x H x W"):
        MRIClassifier("resnet34", image_size=32)(torch.rand(2, 2, 32, 32))


def test_pretrained_without_network_fails_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args, **_options):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(ConnectionError, match="scratch"):
        build_model("resnet34", weights="pretrained")


def test_pretrained_weights_arrive_and_the_head_stays_new(monkeypatch: pytest.MonkeyPatch) -> None:
    published = {k: torch.full_like(v, 0.5) for k, v in BACKBONES["resnet34"].build(1000).state_dict().items()}
    asked = {}

    def deliver(url: str, **options):
        asked.update(options, url=url)
        return published

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", deliver)
    model = build_model("resnet34", weights="pretrained", num_classes=4)
    assert asked["check_hash"] and "resnet34" in asked["url"]
    assert (model.backbone.conv1.weight == 0.5).all() and model.backbone.fc.weight.shape == (4, 512)
    assert not (model.backbone.fc.weight == 0.5).any()


def test_weights_from_a_path(tmp_path: Path, resnet: nn.Module) -> None:
    save_file({k: v.contiguous() for k, v in resnet.state_dict().items()}, tmp_path / "whole.safetensors")
    torch.save(
        {k: v for k, v in resnet.backbone.state_dict().items() if not k.startswith("fc.")}, tmp_path / "body.pth"
    )
    whole = build_model("resnet34", image_size=32, weights=tmp_path / "whole.safetensors").eval()
    body = build_model("resnet34", image_size=32, weights=tmp_path / "body.pth").eval()
    image = torch.rand(1, 1, 32, 32)
    assert torch.equal(whole(image), resnet(image))
    assert torch.equal(body.backbone.layer4[0].conv1.weight, resnet.backbone.layer4[0].conv1.weight)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, resnet: nn.Module) -> None:
    save_file({k: v.contiguous() for k, v in resnet.state_dict().items()}, tmp_path / "four.safetensors")
    with pytest.raises(ValueError, match="does not fit resnet34 with 3 classes"):
        build_model("resnet34", num_classes=3, weights=tmp_path / "four.safetensors")
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "stem": torch.zeros(1)}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="unknown \\['stem'\\]"):
        build_model("resnet34", weights=tmp_path / "odd.pth")
    (tmp_path / "text.pth").write_text("nothing")
    with pytest.raises(ValueError, match="no plain named tensors"):
        build_model("resnet34", weights=tmp_path / "text.pth")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        build_model("resnet34", weights=tmp_path / "none.pth")


def test_adding_a_backbone_takes_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(num_classes: int) -> nn.Module:
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        net.add_module("out", nn.Linear(4, num_classes))
        return net

    mine = Backbone("Mine", build, "out", lambda net: [net[0]], lambda net: [net[0]], dict)
    monkeypatch.setitem(def_models.BACKBONES, "mine", mine)
    model = build_model("mine", image_size=32, trainable="head")
    assert model(torch.rand(2, 1, 50, 50)).shape == (2, 4) and not model.backbone[0].weight.requires_grad


@pytest.mark.parametrize("trainable", ["all", "head"])
def test_grad_cam(trainable: str, splits) -> None:
    model = build_model("resnet34", image_size=64, trainable=trainable).train()
    images = splits.test.pixels(slice(0, 3))
    maps = grad_cam(model, images, torch.tensor([0, 1, 2]))
    assert maps.shape == (3, 128, 128) and maps.min() >= 0 and maps.max() <= 1 and maps.std() > 0
    assert model.training and all(p.grad is None for p in model.parameters())
    assert pick_layer(model, images) is model.backbone.layer2[-1]
    big = build_model("resnet34", image_size=224)
    assert pick_layer(big, images) is big.backbone.layer4[-1]
    assert [len(images) for _, images, _, _ in explain_rows(model.eval(), splits.test, n=3)][-1] <= 3
