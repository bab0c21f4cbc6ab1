"""Explore attack strength: a slider where a kernel runs, a strip of images everywhere else."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import nn

from utils.attacks.attack import Attack
from utils.core.reproducibility import generator
from utils.data.sets import ImageSet
from utils.evaluation.attacker import predict_batch
from utils.reporting.slices import plot_attack_strip

#: Set by ``utils.reporting.notebooks``: outside a browser, a widget's messages can also stall the notebook.
HEADLESS = "MRI_HEADLESS"


def attack_strip(
    model: nn.Module,
    images: ImageSet,
    index: int,
    *,
    epsilons: Sequence[float],
    attack: Attack | None = None,
    note: str = "",
) -> Figure:
    """One image at several radii, with perturbation and class probabilities.

    Args:
        index: which image of ``images``.
        epsilons: radii in [0, 1].
        attack: None is PGD-20.
    """
    attack = attack or Attack()
    device = next(model.parameters()).device
    chosen = torch.tensor([index])
    image, label = images.pixels(chosen, device), images.labels[chosen].to(device)
    attacked = [attack(model, image, label, eps=eps, draws=generator("strip")) for eps in epsilons]
    probabilities = [predict_batch(model, one).softmax(1)[0].tolist() for one in attacked]
    pictures = [one[0].cpu() for one in attacked]
    return plot_attack_strip(
        image[0].cpu(),
        pictures,
        probabilities,
        epsilons,
        images.classes,
        label=int(label),
        attack=attack.title,
        note=note,
    )


def attack_explorer(model: nn.Module, images: ImageSet, *, max_eps: float = 8 / 255, note: str = ""):
    """A slider for the radius and one for the image; moving either attacks again, beside the untouched slice.

    Args:
        max_eps: right end of the slider, in [0, 1].

    Returns:
        an ipywidgets box; None where ``HEADLESS`` is set in the environment, because nobody is there to move it.
    """
    if os.environ.get(HEADLESS):
        return None
    import ipywidgets

    strength = ipywidgets.FloatSlider(
        value=1.0, min=0, max=255 * max_eps, step=0.25, description="eps (/255)", continuous_update=False
    )
    number = ipywidgets.IntSlider(value=0, min=0, max=len(images) - 1, description="image", continuous_update=False)

    def show(eps: float, index: int) -> None:
        from IPython.display import display

        display(attack_strip(model, images, index, epsilons=[0, eps / 255], note=note))

    output = ipywidgets.interactive_output(show, {"eps": strength, "index": number})
    return ipywidgets.VBox([strength, number, output])
