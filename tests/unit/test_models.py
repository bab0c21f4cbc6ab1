from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from models import def_models
from models.def_models import BACKBONES, Backbone, MRIClassifier, build_model
from utils.core.precision import autocast
from utils.evaluation.metrics import predict
from utils.experiments.records import parameter_table
from utils.grad_cam import explain_rows, grad_cam, pick_layer, right_and_wrong


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
@pytest.mark.parametrize("shape", [(2, 1, 128, 128), (2, 3, 224, 224), (2, 1, 176, 208), (1, 1, 40, 40)])
def test_any_image_gives_logits(backbone: str, shape: tuple[int, ...]) -> None:
    model = build_model(backbone, num_classes=3, image_size=64).eval()
    assert model(torch.rand(shape)).shape == (shape[0], 3)


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
@pytest.mark.parametrize("num_classes", [2, 4, 10])
def test_a_new_model_is_undecided(backbone: str, num_classes: int) -> None:
    torch.manual_seed(0)  # whatever ran before
    model = build_model(backbone, num_classes=num_classes, image_size=64).train()
    probabilities = model(torch.rand(8, 1, 64, 64)).softmax(1)
    # over seeds the least is .49; with torch's own start of the head a ResNet34 has .07 to 3.5
    assert 0.4 / num_classes < probabilities.min() and probabilities.max() < 2 / num_classes


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


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_freezing_reaches_every_parameter_of_each_backbone(backbone: str) -> None:
    model = build_model(backbone, image_size=32)
    counts = []
    for trainable in ("head", *range(len(BACKBONES[backbone].blocks(model.backbone)) + 1)):
        model.freeze(trainable)
        counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        assert parameter_table(model).loc["total", "trainable (M)"] == pytest.approx(counts[-1] / 1e6, abs=2e-3)
    assert counts[0] == counts[1] and counts == sorted(counts) and len(set(counts)) == len(counts) - 1
    assert counts[-1] == sum(p.numel() for p in model.parameters())


def test_dinov2_takes_the_next_multiple_of_its_patch() -> None:
    assert [build_model("dino_v2", image_size=side).image_size for side in (56, 64, 224)] == [56, 70, 224]


def test_bfloat16_on_a_cpu_changes_the_way_of_the_attention_and_not_its_gradient() -> None:
    torch.manual_seed(0)
    model = build_model("dino_v2", image_size=42).eval()
    images = torch.rand(2, 1, 42, 42, requires_grad=True)
    found = {}
    for precision in ("fp32", "bf16"):
        with autocast(precision, "cpu"):
            (found[precision],) = torch.autograd.grad(model(images)[:, 0].sum(), images)
        ways = {block.attn.fused_attn for block in model.backbone.blocks}
        assert ways == {precision == "fp32"}
    assert F.cosine_similarity(found["fp32"].flatten(), found["bf16"].flatten(), dim=0) > 0.99


def test_dinov2_weights_of_another_size_are_resampled(tmp_path: Path) -> None:
    large = build_model("dino_v2", image_size=112)
    body = {k: v.half().contiguous() for k, v in large.backbone.state_dict().items() if not k.startswith("head.")}
    save_file(body, tmp_path / "encoder.safetensors")
    small = build_model("dino_v2", image_size=56, weights=tmp_path / "encoder.safetensors")
    assert small.backbone.pos_embed.shape == (1, 17, 384)
    # resampling keeps the mean of a smooth map and every other weight
    assert torch.equal(small.backbone.blocks[3].mlp.fc1.weight.half(), body["blocks.3.mlp.fc1.weight"])
    same = build_model("dino_v2", image_size=112, weights=tmp_path / "encoder.safetensors")
    assert torch.equal(same.backbone.pos_embed.half(), body["pos_embed"])


@pytest.mark.slow
def test_dinov2_pretrained_downloads_by_timm_and_fails_at_once_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    published = {k: torch.full_like(v, 0.25) for k, v in def_models._timm().state_dict().items()}
    asked = []

    def deliver(name: str, *_args, **options):
        asked.append((name, options))
        return published

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", deliver)
    monkeypatch.setattr("timm.models._builder.has_hf_hub", lambda *_args, **_options: True)
    model = build_model("dino_v2", image_size=56, weights="pretrained")
    assert "vit_small_patch14_dinov2.lvd142m" in asked[0][0] and asked[0][1]["weights_only"]
    assert (
        torch.allclose(model.backbone.pos_embed, torch.tensor(0.25))
        and not (model.backbone.head[0].weight == 0.25).any()
    )

    def refuse(*_args, **_options):
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refuse)
    with pytest.raises(ConnectionError, match="no route to host.*scratch"):
        build_model("dino_v2", weights="pretrained")


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
    published = {k: torch.full_like(v, 0.5) for k, v in BACKBONES["resnet34"].build(1000, 224).state_dict().items()}
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
    def build(num_classes: int, image_size: int) -> nn.Module:
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        net.add_module("out", nn.Linear(4, num_classes))
        return net

    mine = Backbone("Mine", build, "out", lambda net: [net[0]], lambda net: [net[0]], dict)
    monkeypatch.setitem(def_models.BACKBONES, "mine", mine)
    model = build_model("mine", image_size=32, trainable="head")
    assert model(torch.rand(2, 1, 50, 50)).shape == (2, 4) and not model.backbone[0].weight.requires_grad


@pytest.mark.parametrize("trainable", ["all", "head"])
@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_grad_cam(backbone: str, trainable: str, splits) -> None:
    torch.manual_seed(0)
    model = build_model(backbone, image_size=64, trainable=trainable).train()
    # the answers of a new model hardly depend on its image
    for layer in model.backbone.get_submodule(model.head_name).modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight)
    images = splits.test.pixels(slice(0, 3))
    maps = grad_cam(model, images, torch.tensor([0, 1, 2]))
    assert maps.shape == (3, 128, 128) and maps.min() >= 0 and maps.max() <= 1 and maps.std() > 0
    assert model.training and all(p.grad is None for p in model.parameters())


def test_grad_cam_reads_the_deepest_layer_that_is_fine_enough(splits) -> None:
    images = splits.test.pixels(slice(0, 3))
    for backbone, small, big in (("resnet34", "layer2.3", "layer4.2"), ("efficientnet_b0", "features.3", "features.8")):
        for size, name in ((64, small), (224, big)):
            model = build_model(backbone, image_size=size).eval()
            assert pick_layer(model, images) is model.backbone.get_submodule(name)


def test_rows_of_maps_show_right_and_wrong_answers_and_the_same_slices_for_all_models(splits) -> None:
    torch.manual_seed(0)
    one, two = (build_model("efficientnet_b0", image_size=32).eval() for _ in range(2))
    rows = explain_rows(one, splits.test, n=3)
    for name, images, maps, captions in rows:
        assert len(images) == len(maps) == len(captions) <= 3
        hits = {caption.split(" → ")[0] == caption.split(" → ")[1] for caption in captions}
        assert hits <= {name == "right"} or name == "right"
    right, wrong = right_and_wrong([one, two], splits.test, n=4)
    answers = torch.stack([predict(model, splits.test).argmax(1) for model in (one, two)])
    hit = answers == splits.test.labels
    assert not hit[:, wrong].any() and len(right) == 4
    assert hit.all(0)[right].sum() == min(4, int(hit.all(0).sum()))


def test_grad_cam_of_the_vit_keeps_each_patch_in_its_place() -> None:
    torch.manual_seed(0)
    model = build_model("dino_v2", image_size=56).eval()
    image = torch.rand(1, 1, 56, 56)
    tokens = model.backbone.forward_features(torch.rand(1, 3, 56, 56))
    assert model.cam_map(tokens).shape == (1, 384, 4, 4)
    assert torch.equal(model.cam_map(tokens)[0, :, 1, 2], tokens[0, 1 + 4 + 2])
    assert grad_cam(model, image).max() > 0


def test_the_last_norm_of_the_vit_would_explain_nothing() -> None:
    torch.manual_seed(0)
    model = build_model("dino_v2", image_size=56).eval()
    assert (grad_cam(model, torch.rand(1, 1, 56, 56), layer=model.backbone.norm) == 0).all()
