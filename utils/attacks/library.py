"""Attacks of the torchattacks package, wrapped so that they leave model, device and random state as they were.

torchattacks puts the whole model into train mode after an attack, reseeds torch's global generator, prints, and
clamps what it should refuse.
"""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils.attacks.balls import project
from utils.attacks.given import as_logits, check_batch, check_logits
from utils.attacks.gradient import default_alpha
from utils.core.checks import number, whole
from utils.core.modes import attack_mode
from utils.core.radii import check_eps

if TYPE_CHECKING:
    import torchattacks

_NORMS = {"linf": "Linf", "l2": "L2"}
_BOTH, _LINF, _L2, _L0 = ("linf", "l2"), ("linf",), ("l2",), ("l0",)
#: Name of each of its attacks -> norms in which it is bounded here. CW and DeepFool look for the smallest L2 change,
#: SparseFool, OnePixel and Pixle for few pixels: what they find beyond the radius is taken back to it. Its GN, VANILA,
#: MultiAttack and LGV are left out: noise, nothing, a list, and one that trains models of its own.
LIBRARY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("FGSM", "BIM", "RFGSM", "PGD", "EOTPGD", "FFGSM", "TPGD", "UPGD", "Jitter", "PGDRS"), _LINF),
    **dict.fromkeys(("MIFGSM", "NIFGSM", "SINIFGSM", "VMIFGSM", "VNIFGSM", "DIFGSM", "TIFGSM"), _LINF),
    **dict.fromkeys(("APGD", "APGDT", "FAB", "Square", "AutoAttack"), _BOTH),
    **dict.fromkeys(("CW", "PGDL2", "DeepFool", "PGDRSL2"), _L2),
    **dict.fromkeys(("SparseFool", "OnePixel", "Pixle"), _L0),
}
#: Those that only know three planes; they get a grey image three times, and treat its planes alike.
_THREE_PLANES = ("TIFGSM", "Pixle")
#: Those that never ask for a gradient.
BLACK_BOX = ("Square", "OnePixel", "Pixle")
#: What is set here, and not by options.
_OWN = ("model", "norm", "eps", "alpha", "steps", "n_queries", "pixels", "seed", "n_classes", "verbose")
#: The official budget of each part of AutoAttack; torchattacks' own AutoAttack makes 10 steps.
AUTOATTACK_STEPS, AUTOATTACK_QUERIES = 100, 5000
#: Its targeted loss ranks the four highest logits; these attacks of ``LIBRARY`` have that loss.
AUTOATTACK_CLASSES = 4
_NEED_FOUR = ("APGDT", "AutoAttack")


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

    whole("queries", queries, 1)
    attack = partial(torchattacks.Square, norm=_NORMS[norm], eps=eps, n_queries=queries, seed=seed)
    return _run(attack, model, images, labels, eps, norm, assume_checked)


def settings_of(name: str) -> dict[str, inspect.Parameter]:
    """What an attack of ``LIBRARY`` can be told, by name.

    Raises:
        ValueError: no such attack.
    """
    import torchattacks

    if name not in LIBRARY:
        raise ValueError(f"torchattacks has {', '.join(LIBRARY)}, not {name!r}")
    return dict(inspect.signature(getattr(torchattacks, name)).parameters)


def check_library_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options that an attack of ``LIBRARY`` does not know, or that are set by its budget.

    Raises:
        ValueError: it does not; the message says which it knows.
    """
    if not options:
        return
    free = [word for word in settings_of(name) if word not in _OWN]
    wrong = [word for word in options if word not in free]
    if wrong:
        raise ValueError(f"{name} takes the options {', '.join(free) or 'none'}, not {', '.join(wrong)}")
    for word, value in options.items():
        if isinstance(value, float):
            number(word, value)


def library_attack(
    name: str,
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    eps: float,
    steps: int = 10,
    alpha: float | None = None,
    norm: str = "linf",
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    assume_checked: bool = False,
) -> torch.Tensor:
    """Any attack of torchattacks by its name there (Kim, 2020, arXiv:2010.01950).

    Args:
        name: a key of ``LIBRARY``.
        eps: radius in ``norm``; what an attack without a radius of its own changes beyond it is taken back.
        steps: iterations, or queries of Square; attacks of one step take none.
        alpha: step size; None takes :func:`utils.attacks.gradient.default_alpha`.
        seed: of everything that it draws, for the batch as a whole.
        options: other arguments of its constructor.
        model, images, labels, norm, assume_checked: see :func:`utils.attacks.gradient.pgd`.

    Raises:
        TypeError, ValueError: see :func:`square` and :func:`check_library_options`; an unknown name, or a norm in which
            the attack is not bounded.
    """
    import torchattacks

    whole("steps", steps, 1)
    options = dict(options or {})
    known = settings_of(name)
    check_library_options(name, options)
    if norm not in LIBRARY[name]:
        raise ValueError(f"{name} is bounded in {' or '.join(LIBRARY[name])}, not in {norm}")
    check_batch(model, images, labels)
    if not len(images):
        return images
    with attack_mode(model), torch.no_grad():
        classes = as_logits(model(images[:1])).shape[-1]
    check_library_classes(name, classes)
    own: dict[str, Any] = {
        "eps": eps,
        "steps": steps,
        "n_queries": steps,
        "seed": seed,
        "n_classes": classes,
        "pixels": int(eps),
    }
    own |= {"norm": _NORMS.get(norm), "alpha": default_alpha(eps, steps if "steps" in known else 2)}
    own |= {} if alpha is None else {"alpha": alpha}
    build = partial(
        getattr(torchattacks, name), **{word: value for word, value in own.items() if word in known} | options
    )
    if name in _THREE_PLANES and images.shape[1] == 1:
        tripled, three = _Tripled(model), images.expand(-1, 3, -1, -1)
        found = _run(build, tripled, three, labels, eps, norm, assume_checked, seed)[:, :1]
    else:
        found = _run(build, model, images, labels, eps, norm, assume_checked, seed)
    # some look for the smallest change whatever its size, and leave [0, 1] by rounding
    return (images + project(found - images, eps, norm)).clamp(0, 1)


def check_library_classes(name: str, classes: int) -> None:
    """Refuse a model on which the loss of an attack of ``LIBRARY`` is not defined.

    Raises:
        ValueError: it has fewer than ``AUTOATTACK_CLASSES`` classes.
    """
    if name in _NEED_FOUR and classes < AUTOATTACK_CLASSES:
        raise ValueError(
            f"{name}'s targeted loss needs four classes, and this model has {classes}: take suite "
            "'standard', whose APGD-T is defined for any number"
        )


def check_autoattack(classes: int) -> None:
    """:func:`check_library_classes` of AutoAttack."""
    check_library_classes("AutoAttack", classes)


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
    whole("steps", steps, 1)
    whole("queries", queries, 1)
    check_batch(model, images, labels)
    if not len(images):
        return images
    with attack_mode(model), torch.no_grad():
        classes = as_logits(model(images[:1])).shape[-1]
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


class _Tripled(nn.Module):
    """A model of grey images behind three planes, of which it sees the mean."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images.mean(1, keepdim=True))


def _run(
    build: Callable[[nn.Module], torchattacks.attack.Attack],
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    eps: float,
    norm: str,
    assume_checked: bool,
    seed: int = 0,
) -> torch.Tensor:
    check_eps(eps, norm)
    check_batch(model, images, labels)
    if not len(images):
        return images
    if not assume_checked:
        with attack_mode(model), torch.no_grad():
            check_logits(as_logits(model(images)), labels)
    height, width = images.shape[-2:]
    side = max(height, width)
    seen = model if height == width else _Cropped(model, height, width)
    # torchattacks asks the parameters where the model is
    seen = seen if any(True for _ in seen.parameters()) else _Placed(seen, images.device)
    quiet = contextlib.redirect_stdout(io.StringIO())
    with attack_mode(model), _own_random(seed), quiet, torch.inference_mode(False), torch.enable_grad():
        attack = build(seen)
        attack.set_device(images.device)
        padded = F.pad(images.detach().clone(), (0, side - width, 0, side - height))
        attacked = attack(padded, labels)[..., :height, :width]
    return attacked.detach().contiguous().to(images.dtype)


class _Placed(nn.Module):
    """A model without parameters, with one."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.model, self.place = model, nn.Parameter(torch.zeros(1, device=device))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)


@contextlib.contextmanager
def _own_random(seed: int) -> Iterator[None]:
    """Random numbers of ``seed`` for an attack that draws from torch's and NumPy's global generators."""
    before = np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(before)
