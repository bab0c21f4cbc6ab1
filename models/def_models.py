"""The classifiers. Add your own backbone to ``BACKBONES``; nothing else has to change.

Everything between the grey image in [0, 1] and the logits happens inside :class:`MRIClassifier`,
so that an attack perturbs the image itself and not a resized or normalised copy of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from models.weight_files import listed, square_grid
from models.weight_loading import load_backbone, load_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
#: Pixels a side that a backbone sees at most; no slice of this field holds more.
LARGEST = 1024


@dataclass(frozen=True)
class Backbone:
    """How to build one architecture. The functions take the module that ``build`` returned.

    Attributes:
        title: name of its folders in ``assets/`` and ``checkpoints/``.
        build: number of classes and image side -> a module with random weights whose output are logits.
        head: attribute path of the final classifier inside that module.
        blocks: returns its parts from input to output, the head left out; freezing counts from the last.
        cam_layers: returns layers for Grad-CAM, the deepest first.
        pretrained: downloads, verifies and returns published weights, with or without a head.
        patch: the image side must be a multiple of it.
        adapt: gives foreign weights the module's names and image side; raises ValueError where it cannot.
        cam_map: turns what a layer of ``cam_layers`` gives into N x C x H x W.
    """

    title: str
    build: Callable[[int, int], nn.Module]
    head: str
    blocks: Callable[[Any], list[nn.Module]]
    cam_layers: Callable[[Any], list[nn.Module]]
    pretrained: Callable[[], dict[str, torch.Tensor]]
    patch: int = 1
    adapt: Callable[[dict[str, torch.Tensor], Any], dict[str, torch.Tensor]] = lambda state, _: state
    cam_map: Callable[[torch.Tensor], torch.Tensor] = lambda output: output


def _torchvision(name: str) -> dict[str, Any]:
    """What ``Backbone`` asks for building a CNN; torchvision is slow to import, and only who builds one waits."""

    def build(num_classes: int, image_size: int) -> nn.Module:
        from torchvision.models import get_model

        return get_model(name, weights=None, num_classes=num_classes)

    def pretrained() -> dict[str, torch.Tensor]:
        from torchvision.models import get_model_weights

        return get_model_weights(name).DEFAULT.get_state_dict(progress=True, check_hash=True)

    return {"build": build, "pretrained": pretrained}


DINOV2 = "vit_small_patch14_dinov2.lvd142m"


def _timm(**options: Any) -> Any:
    import timm  # slow to import; the CNNs do without

    return timm.create_model(DINOV2, num_classes=0, **options)


def _build_dinov2(num_classes: int, image_size: int) -> nn.Module:
    net = _timm(img_size=image_size)
    net.head = nn.Sequential(nn.Linear(net.num_features, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, num_classes))
    for block in net.blocks:
        block.attn.register_forward_pre_hook(_choose_attention)
    return net


def _choose_attention(attention: Any, _: tuple[torch.Tensor, ...]) -> None:
    """Leave out torch's fused attention in bfloat16 on a CPU: its gradient is several times slower than products."""
    attention.fused_attn = not torch.is_autocast_enabled("cpu")


def _dinov2_blocks(net: Any) -> list[nn.Module]:
    embedding = nn.ModuleList([net.patch_embed, nn.ParameterList([net.pos_embed, net.cls_token])])
    *inner, last = net.blocks
    return [embedding, *inner, nn.ModuleList([last, net.norm])]


def _adapt_dinov2(state: dict[str, torch.Tensor], net: Any) -> dict[str, torch.Tensor]:
    """Names of facebook's trainer, and position embeddings of another image side, as ``net`` has them.

    Raises:
        ValueError: weights with register tokens.
    """
    from timm.layers import resample_abs_pos_embed

    registers = [name for name in state if name in ("register_tokens", "reg_token")]
    if registers:
        raise ValueError(f"it has {registers[0]}, and this model no registers; take the weights without registers")
    # the trainer numbers its blocks within chunks, but by their place in the whole network
    state = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name): value for name, value in state.items()}
    positions = state.get("pos_embed")
    if positions is None or positions.shape == net.pos_embed.shape:
        return state
    return state | {"pos_embed": resample_abs_pos_embed(square_grid(positions), list(net.patch_embed.grid_size))}


def _adapt_efficientnet(state: dict[str, torch.Tensor], net: nn.Module) -> dict[str, torch.Tensor]:
    """timm's names of the same layers, as torchvision has them.

    EfficientNet-Lite0 has all of them but squeeze-and-excitation, which then begins with its gates all but open.
    """
    if "conv_stem.weight" not in state:
        return state
    import timm  # slow to import

    with torch.device("meta"):
        names = timm.create_model("efficientnet_b0").state_dict()
    own = net.state_dict()
    torchvision_names = dict(zip(names, own, strict=True))  # both list the layers from input to output
    adapted = {torchvision_names.get(name, name): value for name, value in state.items()}
    if any(".se." in name for name in state):
        return adapted
    gates = {torchvision_names[name]: name for name in names if ".se." in name}
    return adapted | {new: _open_gate(old, own[new]) for new, old in gates.items()}


def _open_gate(name: str, value: torch.Tensor) -> torch.Tensor:
    """A tensor of squeeze-and-excitation, by timm's name, with which it lets everything pass."""
    if name.endswith("conv_expand.weight"):
        return torch.zeros_like(value)
    return torch.full_like(value, 6.0) if name.endswith("conv_expand.bias") else value


def _patches_as_map(tokens: torch.Tensor) -> torch.Tensor:
    """N x (1 + side * side) x C tokens without the class token, as N x C x side x side."""
    patches = tokens[:, 1:]
    side = math.isqrt(patches.shape[1])
    return patches.transpose(1, 2).unflatten(2, (side, side))


# To add a backbone, add an entry: title, how to build it, where its head is, and its blocks.
BACKBONES: dict[str, Backbone] = {
    "dino_v2": Backbone(
        title="DINOv2",
        build=_build_dinov2,
        head="head",
        blocks=_dinov2_blocks,
        # the output of net.norm reaches the logits through the class token alone: its map would be zero
        cam_layers=lambda net: [net.blocks[-1].norm1],
        pretrained=lambda: _timm(pretrained=True).state_dict(),
        patch=14,
        adapt=_adapt_dinov2,
        cam_map=_patches_as_map,
    ),
    "resnet34": Backbone(
        title="ResNet34",
        head="fc",
        blocks=lambda net: [nn.ModuleList([net.conv1, net.bn1]), net.layer1, net.layer2, net.layer3, net.layer4],
        cam_layers=lambda net: [net.layer4[-1], net.layer3[-1], net.layer2[-1]],
        **_torchvision("resnet34"),
    ),
    "efficientnet_b0": Backbone(
        title="EfficientNetB0",
        head="classifier",
        blocks=lambda net: list(net.features),
        cam_layers=lambda net: [net.features[8], net.features[5], net.features[3]],
        adapt=_adapt_efficientnet,
        **_torchvision("efficientnet_b0"),
    ),
}


def _undecided(head: nn.Module, num_classes: int) -> None:
    """Start the last layer near zero, so that a new model gives all classes about the same probability.

    torchvision draws the head of EfficientNet from a range that fits a thousand classes; with four the logits of a new
    model spread over seven units, and a short fine-tuning spends its steps on undoing that.
    """
    for layer in head.modules():
        if isinstance(layer, nn.Linear) and layer.out_features == num_classes:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)


class MRIClassifier(nn.Module):
    """Grey or three-channel images in [0, 1] of any size to logits.

    The forward pass resizes to ``image_size`` (bilinear, antialiased, differentiable), repeats a
    grey channel three times, normalises and applies the backbone. Mean and standard deviation are
    buffers and travel with the weights.

    Args:
        backbone: key of ``BACKBONES``.
        num_classes: number of logits, at least 2.
        image_size: side in pixels of the square that the backbone sees; one that cuts images into
            patches takes the next multiple of its patch.

    Raises:
        ValueError: unknown backbone, fewer than two classes, or a side below 32 or above 1024 pixels.
    """

    def __init__(self, backbone: str, *, num_classes: int = 4, image_size: int = 224) -> None:
        super().__init__()
        _check_backbone(backbone)
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, not {num_classes}")
        if not 32 <= image_size <= LARGEST:
            raise ValueError(f"image_size must be from 32 to {LARGEST} pixels, not {image_size}")
        self.backbone_name = backbone
        self.num_classes = num_classes
        patch = BACKBONES[backbone].patch
        self.image_size = -(-image_size // patch) * patch
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.backbone = BACKBONES[backbone].build(num_classes, self.image_size)
        _undecided(self.backbone.get_submodule(BACKBONES[backbone].head), num_classes)
        self.backbone.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, N x num_classes, of images N x 1 x H x W or N x 3 x H x W in [0, 1]."""
        # under autocast the loss is still to be float32
        return self.backbone(self.prepared(images)).to(images.dtype)

    def prepared(self, images: torch.Tensor) -> torch.Tensor:
        """What the backbone sees of images: N x 3 x image_size x image_size, normalised.

        Raises:
            ValueError: images of another shape than :meth:`forward` takes.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be N x 1 x H x W or N x 3 x H x W, not {tuple(images.shape)}")
        side = (self.image_size, self.image_size)
        if images.shape[-2:] != side:
            images = F.interpolate(images, side, mode="bilinear", align_corners=False, antialias=True)
        normalised = (images.expand(-1, 3, -1, -1) - self.mean) / self.std
        return normalised.contiguous(memory_format=torch.channels_last)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What the head would read, N x F, of images as :meth:`forward` takes them."""
        return self.look(images)[0]

    def look(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`features` and the logits of :meth:`forward`, by one pass."""
        seen: list[torch.Tensor] = []
        head = self.backbone.get_submodule(self.head_name)
        handle = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            logits = self(images)
        finally:
            handle.remove()
        return seen[0], logits

    def train(self, mode: bool = True) -> MRIClassifier:
        """As in torch, but normalisation layers whose parameters are frozen keep their statistics."""
        super().train(mode)
        for module in self.modules():
            own = list(module.parameters(recurse=False))
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and own:
                module.train(mode and any(parameter.requires_grad for parameter in own))
        return self

    def freeze(self, trainable: str | int = "all") -> MRIClassifier:
        """Set ``requires_grad``: ``"all"``, ``"head"``, or the head and the last n blocks.

        Raises:
            ValueError: any other word, or more blocks than the backbone has.
        """
        blocks = self.blocks
        words = {"all": len(blocks), "head": 0}
        last = words.get(trainable, trainable) if isinstance(trainable, str) else trainable
        if isinstance(last, str) or not 0 <= last <= len(blocks):
            raise ValueError(f"trainable must be 'all', 'head' or 0..{len(blocks)} blocks, not {trainable!r}")
        self.requires_grad_(trainable == "all" or last == len(blocks))
        for block in blocks[len(blocks) - last :]:
            block.requires_grad_(True)
        self.backbone.get_submodule(self.head_name).requires_grad_(True)
        return self.train(self.training)

    def freeze_batchnorm(self) -> MRIClassifier:
        """Keep the statistics and the scales of all BatchNorm layers as they are from now on."""
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.requires_grad_(False)
        return self.train(self.training)

    @property
    def blocks(self) -> list[nn.Module]:
        """Parts from input to output, the head left out."""
        return BACKBONES[self.backbone_name].blocks(self.backbone)

    @property
    def head_name(self) -> str:
        """Attribute path of the final classifier inside ``backbone``."""
        return BACKBONES[self.backbone_name].head

    def adapt(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Foreign weights under the names of ``backbone``; see :attr:`Backbone.adapt`."""
        return BACKBONES[self.backbone_name].adapt(state, self.backbone)

    @property
    def title(self) -> str:
        """Folder name in ``assets/`` and ``checkpoints/``."""
        return BACKBONES[self.backbone_name].title

    @property
    def cam_layers(self) -> list[nn.Module]:
        """Layers whose activations Grad-CAM can weigh, the deepest first."""
        return BACKBONES[self.backbone_name].cam_layers(self.backbone)

    def cam_map(self, output: torch.Tensor) -> torch.Tensor:
        """What one of ``cam_layers`` gives, as N x C x H x W."""
        return BACKBONES[self.backbone_name].cam_map(output)


def _check_backbone(name: str) -> None:
    if name not in BACKBONES:
        raise ValueError(f"backbone {name!r} is not one of {', '.join(BACKBONES)}; see models/def_models.py")


def default_size(backbone: str, device: torch.device | str) -> int:
    """Side in pixels of a backbone's input where nobody names one: what the images hold on a CPU, 224 on a GPU.

    The slices are 128 pixels wide, and more only enlarges them; a backbone that cuts patches takes the next multiple
    of their side below.

    Args:
        backbone: key of ``BACKBONES``.

    Raises:
        ValueError: an unknown backbone.
    """
    _check_backbone(backbone)
    side = 128 if torch.device(device).type == "cpu" else 224
    return side // BACKBONES[backbone].patch * BACKBONES[backbone].patch


def build_model(
    backbone: str,
    *,
    num_classes: int = 4,
    image_size: int = 224,
    weights: str | Path = "scratch",
    trainable: str | int = "all",
    classes: Sequence[str] | None = None,
    say: Callable[[str], object] | None = print,
) -> MRIClassifier:
    """Make a classifier.

    Args:
        backbone: key of ``BACKBONES``.
        num_classes: number of logits.
        image_size: side in pixels of the backbone's input.
        weights: ``scratch`` (random), ``pretrained`` (downloaded and verified by the library
            that publishes them: ImageNet for the CNNs, LVD-142M for DINOv2), or the path of a
            ``.safetensors``, ``.pth`` or ``.pt`` file; see :func:`load_weights`.
        trainable: see :meth:`MRIClassifier.freeze`.
        classes: names in the order of the logits, against which weights that bring a head are checked.
        say: is told once what was loaded from a path; None keeps silent.

    Raises:
        FileNotFoundError: no such weights file.
        ConnectionError: ``pretrained`` could not be downloaded; nothing else is loaded instead.
        ValueError: the weights do not fit the backbone or the classes.
    """
    if classes is not None and len(classes) != num_classes:
        raise ValueError(f"num_classes is {num_classes}, but there are {len(classes)} classes: {listed(classes)}")
    model = MRIClassifier(backbone, num_classes=num_classes, image_size=image_size)
    if str(weights) == "pretrained":
        # a published head answers for other classes, also where it has as many
        load_backbone(model, _download(backbone), origin="the published weights", keep_head=False)
    elif str(weights) != "scratch":
        loaded = load_weights(model, Path(weights), classes=classes)
        if say:
            say(f"weights: {loaded}")
    return model.freeze(trainable)


def _download(backbone: str) -> dict[str, torch.Tensor]:
    try:
        return BACKBONES[backbone].pretrained()
    except Exception as error:
        raise ConnectionError(
            f"the pretrained weights of {backbone} could not be fetched ({error}). Connect to the "
            "internet once, or give the path of a weights file, or use weights='scratch'."
        ) from error
