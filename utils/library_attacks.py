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
from torch import nn

from utils.attacks import check_batch
from utils.modes import attack_mode
from utils.radii import check_eps

if TYPE_CHECKING:
    import torchattacks

_NORMS = {"linf": "Linf", "l2": "L2"}


def square(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    eps: float,
    queries: int = 1000,
    norm: str = "linf",
    seed: int = 0,
) -> torch.Tensor:
    """Square Attack (Andriushchenko et al., 2020, arXiv:1912.00049): random search that sees only the outputs.

    Args:
        queries: forward passes a sample at most.
        seed: of the search.
        model, images, labels, eps, norm: see :func:`utils.attacks.pgd`.

    Raises:
        TypeError, ValueError: see :func:`utils.attacks.check_batch` and :func:`utils.attacks.check_eps`.
    """
    import torchattacks

    attack = partial(torchattacks.Square, model, norm=_NORMS[norm], eps=eps, n_queries=queries, seed=seed)
    return _run(attack, model, images, labels, eps, norm)


def auto_attack(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    eps: float,
    norm: str = "linf",
    seed: int = 0,
) -> torch.Tensor:
    """AutoAttack, standard version (Croce and Hein, 2020, arXiv:2003.01690), as a check on our own attacks.

    Args:
        model, images, labels, eps, norm, seed: see :func:`square`.

    Raises:
        TypeError, ValueError: as :func:`square`; also fewer than four classes, which its targeted ratio needs.
    """
    with attack_mode(model), torch.no_grad():
        classes = model(images[:1]).shape[1]
    if classes < 4:
        raise ValueError(f"AutoAttack's targeted loss needs four classes, and this model has {classes}; use apgd_t")
    import torchattacks

    attack = partial(torchattacks.AutoAttack, model, norm=_NORMS[norm], eps=eps, n_classes=classes, seed=seed)
    return _run(attack, model, images, labels, eps, norm)


def _run(
    build: Callable[[], torchattacks.attack.Attack],
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    eps: float,
    norm: str,
) -> torch.Tensor:
    check_eps(eps, norm)
    check_batch(model, images, labels)
    quiet, own_random = contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng()
    with attack_mode(model), own_random, quiet, torch.inference_mode(False), torch.enable_grad():
        attack = build()
        attack.set_device(images.device)
        attacked = attack(images.detach().clone(), labels)
    return attacked.detach().to(images.dtype)
