"""How much of a slice an attack needs: parts of the anatomy, what Grad-CAM points at, and the smallest part that does.

The idea is Kryptonite's (arXiv:2108.10251), whose method is not public: here PGD may change nothing outside a mask.
What it finds lies in the ball of the whole image, so that it is never stronger: who is misclassified by a change of a
part is so by a change of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from models.def_models import MRIClassifier
from utils.attacks.attack import Attack
from utils.attacks.gradient import ascent, cross_entropy
from utils.core.modes import attack_mode
from utils.core.parts import Part
from utils.data.anatomy import PARTS, part_masks
from utils.data.sets import ImageSet
from utils.evaluation.attacker import predict_batch
from utils.experiments.atlas.bench import RADII, Bench, Whom, whom
from utils.grad_cam import grad_cam

WHOLE, SEEN, ELSEWHERE = "whole image", "Grad-CAM's top tenth", "a tenth elsewhere"
#: Share of the pixels that Grad-CAM's region has.
TOP = 0.1
#: Radius of the smallest sufficient region, how often its share is halved or doubled, and pixels a side of its picture.
EPS = 4 / 255
HALVINGS = 6
SIDE = 32


class Region(Part):
    """One region: its share of the image, and the share of right slices that are misclassified, by radius."""

    area: float
    misclassified: list[float]


class Sufficient(Part):
    """The smallest region that alone changes an answer, by the ranking of one whole attack.

    Attributes:
        shares: of the pixels, for each right slice that an attack on the whole image changes.
        unchanged: right slices that even the whole image's attack leaves.
        seen: share of those slices in whose region a pixel is, ``SIDE`` x ``SIDE``.
    """

    shares: list[float]
    unchanged: int
    seen: list[list[float]]


class RegionsFound(Part):
    """Model -> region -> what it is worth, and the smallest sufficient one."""

    whom: Whom
    radii: list[float]
    regions: dict[str, dict[str, Region]]
    sufficient: dict[str, Sufficient]


def top_share(values: torch.Tensor, share: torch.Tensor | float) -> torch.Tensor:
    """Mask of the highest ``share`` of the values of each image, N x 1 x H x W; at least one pixel.

    Args:
        values: N x 1 x H x W.
        share: one for all, or N.
    """
    flat = values.flatten(1)
    count = (torch.as_tensor(share).to(flat).expand(len(flat)) * flat.shape[1]).round().clamp(min=1)
    rank = flat.argsort(1, descending=True).argsort(1)
    return (rank < count[:, None]).reshape(values.shape)


def _seen(model: MRIClassifier, pixels: torch.Tensor) -> torch.Tensor:
    return top_share(torch.from_numpy(grad_cam(model, pixels))[:, None].to(pixels.device), TOP)


def _elsewhere(model: MRIClassifier, pixels: torch.Tensor) -> torch.Tensor:
    """As many pixels of the brain, where Grad-CAM points least."""
    heat = torch.from_numpy(grad_cam(model, pixels))[:, None].to(pixels.device)
    return top_share(torch.where(part_masks(pixels, "brain"), -heat, -torch.inf), TOP)


def _masks() -> dict[str, Callable[[MRIClassifier, torch.Tensor], torch.Tensor]]:
    named: dict[str, Callable[[MRIClassifier, torch.Tensor], torch.Tensor]] = {
        WHOLE: lambda _, pixels: torch.ones_like(pixels, dtype=torch.bool),
    }
    for part in PARTS:
        named[part] = lambda _, pixels, part=part: part_masks(pixels, part)  # type: ignore[misc]
    return named | {SEEN: _seen, ELSEWHERE: _elsewhere}


def measure(bench: Bench) -> RegionsFound:
    """PGD inside each region, at each radius, on slices that are right without attack."""
    regions, sufficient = {}, {}
    for name, model in bench.models.items():
        images = _right(bench, model)
        regions[name] = _regions(bench, model, images)
        sufficient[name] = _sufficient(bench, model, images)
    return RegionsFound(whom=whom(bench), radii=list(bench.radii(RADII)), regions=regions, sufficient=sufficient)


def _right(bench: Bench, model: MRIClassifier) -> ImageSet:
    images = bench.few()
    right = predict_batch(model, images.pixels(slice(None), bench.device)).argmax(1).cpu() == images.labels
    return images.subset(torch.nonzero(right)[:, 0])


def _regions(bench: Bench, model: MRIClassifier, images: ImageSet) -> dict[str, Region]:
    radii = bench.radii(RADII)
    if not len(images):
        return {title: Region(area=0.0, misclassified=[0.0] * len(radii)) for title in _masks()}
    pixels = images.pixels(slice(None), bench.device)
    masks = {title: mask(model, pixels).cpu() for title, mask in _masks().items()}
    fooled = {title: _fooled(bench, model, images, mask, radii) for title, mask in masks.items()}
    fooled[WHOLE] = torch.stack(list(fooled.values())).any(0)
    return {
        title: Region(area=float(masks[title].float().mean()), misclassified=own.float().mean(1).tolist())
        for title, own in fooled.items()
    }


def _fooled(
    bench: Bench, model: MRIClassifier, images: ImageSet, mask: torch.Tensor, radii: Sequence[float]
) -> torch.Tensor:
    """Who is misclassified within each of the radii by a change inside the mask, bool R x N."""
    curve = bench.attacked(model, images, Attack("pgd", steps=bench.budget.steps), radii, within=mask)
    return ~torch.stack([curve.robust(step) for step in range(1, len(curve.epsilons))])


def _sufficient(bench: Bench, model: MRIClassifier, images: ImageSet) -> Sufficient:
    """Pixels are ranked by what they add to the loss of the whole attack, then the share is searched by halving."""
    changed, whole = bench.misclassified(model, images, Attack("pgd", steps=bench.budget.steps), EPS)
    unchanged = len(images) - len(changed)
    if not len(changed):
        return Sufficient(shares=[], unchanged=unchanged, seen=[[0.0] * SIDE for _ in range(SIDE)])
    images = images.subset(changed)
    pixels, labels = images.pixels(slice(None), bench.device), images.labels.to(bench.device)
    with attack_mode(model):
        gradient = ascent(model, whole, labels, cross_entropy).gradient
    weight = (gradient * (whole - pixels)).sum(1, keepdim=True).cpu()
    low, high = torch.zeros(len(pixels)), torch.ones(len(pixels))
    for _ in range(HALVINGS):
        # on a logarithmic scale, down to one in 2 ** HALVINGS
        middle = torch.where(low == 0, high / 2, (low * high).sqrt())
        enough = _fooled(bench, model, images, top_share(weight, middle), [EPS])[0]
        high, low = torch.where(enough, middle, high), torch.where(enough, low, middle)
    region = top_share(weight, high).float().mean(0, keepdim=True)
    seen = F.interpolate(region, (SIDE, SIDE), mode="area")[0, 0]
    return Sufficient(
        shares=[round(value, 4) for value in high.tolist()],
        unchanged=unchanged,
        seen=[[round(value, 4) for value in row] for row in seen.tolist()],
    )
