"""The animation of the README: one slice attacked ever harder, and what a plain and a hardened model say of it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from utils.attacks.attack import Attack
from utils.core.paths import atomic_write
from utils.core.radii import radius_label
from utils.core.reproducibility import generator
from utils.data.sets import ImageSet
from utils.data.workspace import pick_device
from utils.evaluation.attacker import predict_batch
from utils.experiments.records import display_name
from utils.reporting.style import COLOURS, axes_of, finish

#: Radii of the frames.
EPSILONS = tuple(step / 4 / 255 for step in range(17))
_FRAME_MS, _LAST_MS = 350, 2500
_COLOURS_OF_A_FRAME = 48


def sweep(models: Mapping[str, torch.nn.Module], image: ImageSet, epsilons: Sequence[float] = EPSILONS) -> dict:
    """One image as PGD-20 changes it to fool each model, at each radius.

    Args:
        models: title -> model.
        image: a set of one image.

    Returns:
        title -> the attacked images (R x 1 x H x W) and the model's probabilities (R x K), on the CPU.
    """
    attack, device = Attack(), pick_device()
    pixels, labels = image.pixels(slice(None), device), image.labels.to(device)
    found = {}
    for title, model in models.items():
        changed = [attack(model.to(device), pixels, labels, eps=e, draws=generator("hero")) for e in epsilons]
        images = torch.cat(changed)
        found[title] = (images.cpu(), predict_batch(model, images).softmax(1).cpu())
    return found


def frame(
    found: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    step: int,
    classes: Sequence[str],
    *,
    label: int,
    eps: float,
    attack: str,
    notes: Sequence[str],
) -> Figure:
    """One frame of :func:`sweep`: a pair of slice and answer for each model.

    Args:
        attack: its title.
    """
    figure, (axes,) = axes_of(1, 2 * len(found), size=(4.5 * len(found), 3.4), width_ratios=(1.15, 1) * len(found))
    for number, (title, (images, probabilities)) in enumerate(found.items()):
        picture, bars = axes[2 * number : 2 * number + 2]
        picture.imshow(images[step, 0], cmap="gray", vmin=0, vmax=1)
        picture.axis("off")
        _draw_answer(bars, probabilities[step].tolist(), classes, label)
        picture.set_title(display_name(title))
    size = f"{attack} changes each pixel by at most {radius_label(eps)}" if eps else "not attacked yet"
    return finish(figure, f"True class {classes[label]} (blue); {size}", *notes)


def turned_at(chances: torch.Tensor, label: int, epsilons: Sequence[float] = EPSILONS) -> str:
    """The first radius at which the answers, R x K, are wrong, in words."""
    wrong = torch.nonzero(chances.argmax(1) != label)[:, 0]
    return f"misclassified from {radius_label(epsilons[int(wrong[0])])} on" if len(wrong) else "always right"


def _draw_answer(ax: Axes, chances: Sequence[float], classes: Sequence[str], label: int) -> None:
    answer = max(range(len(chances)), key=chances.__getitem__)
    colours = [COLOURS[0] if number == label else COLOURS[1] for number in range(len(chances))]
    ax.barh(range(len(chances)), [100 * chance for chance in chances], color=colours)
    ax.set(yticks=range(len(classes)), yticklabels=classes, xlim=(0, 100), xlabel="probability (%)")
    ax.invert_yaxis()
    verdict = "right" if answer == label else "misclassified"
    ax.set_title(f"{classes[answer]}: {verdict}", fontsize=10, color=COLOURS[0] if answer == label else COLOURS[1])


def save_animation(figures: Sequence[Figure], path: Path) -> Path:
    """Write a GIF that starts again after a pause, atomically, and return its path.

    Raises:
        ValueError: there is no frame.
    """
    if not figures:
        raise ValueError(f"{path} needs at least one frame")
    frames = []
    for figure in figures:
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=100)
        frames.append(Image.open(drawn).convert("RGB"))
    # one palette for all frames, taken from the last, whose colours are the most: else the greys flicker
    palette = frames[-1].quantize(_COLOURS_OF_A_FRAME, dither=Image.Dither.NONE)
    small = [one.quantize(palette=palette, dither=Image.Dither.NONE) for one in frames]
    times = [_FRAME_MS] * (len(small) - 1) + [_LAST_MS]
    options: dict[str, Any] = {"save_all": True, "append_images": small[1:], "duration": times, "loop": 0}
    atomic_write(path, lambda file: small[0].save(file, "GIF", optimize=True, **options))
    return path
