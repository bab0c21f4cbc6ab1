"""Attacks of the torchattacks package, wrapped so that they leave model, device and random state as they were.

torchattacks puts the whole model into train mode after an attack, reseeds torch's global generator, prints, and
clamps what it should refuse.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from utils.attacks.gradient import check_batch, check_logits
from utils.core.modes import attack_mode
from utils.core.radii import check_eps

if TYPE_CHECKING:
    import torchattacks

_NORMS = {"linf": "Linf", "l2": "L2"}
#: The official budget of each part of AutoAttack; torchattacks' own AutoAttack makes 10 steps.
AUTOATTACK_STEPS, AUTOATTACK_QUERIES = 100, 5000
#: Its targeted loss ranks the four highest logits.
AUTOATTACK_CLASSES = 4


def square(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    eps: float,
    queries: int = 1000,
    norm: str = "linf",
    seed: int = 0,
    assume_checked: bool = False,
) -> torch.Tensor:
    """Square Attack (Andriushchenko et al., 2020, arXiv:1912.00049): random search that sees only the outputs.

    Args:
        queries: forward passes a sample at most.
        seed: of the search.
        model, images, labels, eps, norm, assume_checked: see :func:`utils.attacks.gradient.pgd`.

    Raises:
        TypeError, ValueError: see :func:`utils.attacks.gradient.pgd` and :func:`utils.core.radii.check_eps`.
    """
    import torchattacks

    attack = partial(torchattacks.Square, norm=_NORMS[norm], eps=eps, n_queries=queries, seed=seed)
    return _run(attack, model, images, labels, eps, norm, assume_checked)


def check_autoattack(classes: int) -> None:
    """Refuse a model on which AutoAttack's targeted loss is not defined.

    Raises:
        ValueError: fewer than ``AUTOATTACK_CLASSES`` classes.
    """
    if classes < AUTOATTACK_CLASSES:
        raise ValueError(
            f"AutoAttack's targeted loss needs four classes, and this model has {classes}: take suite "
            "'standard', whose APGD-T is defined for any number"
        )


def auto_attack(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    eps: float,
    norm: str = "linf",
    seed: int = 0,
    steps: int = AUTOATTACK_STEPS,
    queries: int = AUTOATTACK_QUERIES,
    assume_checked: bool = False,
) -> torch.Tensor:
    """AutoAttack, standard version (Croce and Hein, 2020, arXiv:2003.01690), as a check on our own attacks.

    APGD on the cross-entropy, targeted APGD, targeted FAB and Square, one start each, each on what the former left.

    Args:
        steps: of each gradient attack; the standard version has 100.
        queries: of Square; the standard version has 5,000.
        model, images, labels, eps, norm, seed, assume_checked: see :func:`square`.

    Raises:
        TypeError, ValueError: as :func:`square`; also see :func:`check_autoattack`.
    """
    check_batch(model, images, labels)
    with attack_mode(model), torch.no_grad():
        classes = model(images[:1]).shape[1]
    check_autoattack(classes)
    build = partial(_parts, norm=_NORMS[norm], eps=eps, seed=seed, classes=classes, steps=steps, queries=queries)
    return _run(build, model, images, labels, eps, norm, assume_checked)


def _parts(
    model: nn.Module, *, norm: str, eps: float, seed: int, classes: int, steps: int, queries: int
) -> torchattacks.attack.Attack:
    import torchattacks as ta

    return ta.MultiAttack(
        [
            ta.APGD(model, norm=norm, eps=eps, steps=steps, seed=seed, loss="ce"),
            ta.APGDT(model, norm=norm, eps=eps, steps=steps, seed=seed, n_classes=classes),
            ta.FAB(model, norm=norm, eps=eps, steps=steps, seed=seed, multi_targeted=True, n_classes=classes),
            ta.Square(model, norm=norm, eps=eps, n_queries=queries, seed=seed),
        ]
    )


class _Cropped(nn.Module):
    """A model behind square images: torchattacks' Square takes the height for the width as well.

    What lies beyond the image is cut off before the model sees it, so that only the image itself is ever attacked.
    """

    def __init__(self, model: nn.Module, height: int, width: int) -> None:
        super().__init__()
        self.model, self.height, self.width = model, height, width

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images[..., : self.height, : self.width])


def _run(
    build: Callable[[nn.Module], torchattacks.attack.Attack],
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    eps: float,
    norm: str,
    assume_checked: bool,
) -> torch.Tensor:
    check_eps(eps, norm)
    check_batch(model, images, labels)
    if not assume_checked and len(images):
        with attack_mode(model), torch.no_grad():
            check_logits(model(images).float(), labels)
    height, width = images.shape[-2:]
    side = max(height, width)
    seen = model if height == width else _Cropped(model, height, width)
    quiet, own_random = contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng()
    with attack_mode(model), own_random, quiet, torch.inference_mode(False), torch.enable_grad():
        attack = build(seen)
        attack.set_device(images.device)
        padded = F.pad(images.detach().clone(), (0, side - width, 0, side - height))
        attacked = attack(padded, labels)[..., :height, :width]
    return attacked.detach().contiguous().to(images.dtype)
