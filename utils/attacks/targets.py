"""Where a targeted attack wants to go: to a class, to several, or to one that depends on each image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from utils.attacks.balls import Draws
from utils.attacks.given import as_logits, check_batch, check_logits
from utils.attacks.gradient import Loss, pgd
from utils.core.modes import attack_mode
from utils.core.radii import check_eps
from utils.data.classes import healthy_place

#: Targets that depend on the image: its likeliest wrong class and least likely class, and its stage's neighbours.
RELATIVE = ("likeliest", "least_likely", "next", "former")
#: Targets that are a side of the question whether somebody is ill.
HEALTHY, ILL = "healthy", "ill"


def parse_target(text: str, classes: Sequence[str]) -> str | tuple[int, ...]:
    """The target that somebody typed: a word of ``RELATIVE``, ``healthy``, ``ill``, or the name of a class.

    >>> parse_target("ill", ["Non", "VeryMild", "Mild"]), parse_target("Mild", ["Non", "VeryMild", "Mild"])
    ((1, 2), (2,))

    Raises:
        ValueError: none of these; ``healthy`` or ``ill`` where no class is known to mean healthy.
    """
    names = [name.lower() for name in classes]
    if text.lower() in names:
        return (names.index(text.lower()),)
    if text in RELATIVE:
        return text
    if text not in (HEALTHY, ILL):
        known = ", ".join((*RELATIVE, HEALTHY, ILL, *classes))
        raise ValueError(f"a target must be one of {known}, not {text!r}")
    place = healthy_place(classes, "; name a class as target")
    return (place,) if text == HEALTHY else tuple(k for k in range(len(classes)) if k != place)


def check_target(target: object) -> str | tuple[int, ...]:
    """A target as an attack takes it: a word of ``RELATIVE``, or indices of classes.

    Raises:
        ValueError: something else.
    """
    if isinstance(target, str) and target in RELATIVE:
        return target
    if isinstance(target, Sequence) and not isinstance(target, str) and len(target):
        places = tuple(target)
        if all(isinstance(place, int) and not isinstance(place, bool) and place >= 0 for place in places):
            return places
    raise ValueError(f"target must be one of {', '.join(RELATIVE)} or indices of classes, not {target!r}")


def target_label(target: str | Sequence[int]) -> str:
    """A target for titles.

    >>> target_label("least_likely"), target_label([0]), target_label([1, 2, 3])
    ('the least likely class', 'class 0', 'classes 1, 2, 3')
    """
    if isinstance(target, str):
        return f"the {target.replace('_', ' ')} {'stage' if target in ('next', 'former') else 'class'}"
    return f"class{'es' * (len(target) > 1)} {', '.join(map(str, target))}"


def target_mask(target: str | Sequence[int], logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Which classes each image is to be taken for, bool N x K.

    A row is empty where there is nowhere to go: the last stage has no next one, and who is in the target is there.

    Args:
        target: of :func:`check_target`.
        logits: N x K, of the images as they are.
        labels: int64 tensor N, the true classes.

    Raises:
        ValueError: an index that the model has no class for.
    """
    n, k = logits.shape
    own = torch.nn.functional.one_hot(labels, k).bool()
    if not isinstance(target, str):
        if max(target) >= k:
            raise ValueError(f"the model has classes 0 to {k - 1}, not {max(target)}")
        wanted = torch.zeros(k, dtype=torch.bool, device=logits.device)
        wanted[list(target)] = True
        return wanted.expand(n, k) & ~wanted[labels][:, None]
    if target in ("likeliest", "least_likely"):
        away = logits.masked_fill(own, -torch.inf if target == "likeliest" else torch.inf)
        place = away.argmax(1) if target == "likeliest" else away.argmin(1)
    else:
        place = labels + (1 if target == "next" else -1)
    inside = (place >= 0) & (place < k)
    return torch.nn.functional.one_hot(place.clamp(0, k - 1), k).bool() & inside[:, None]


class Towards(nn.Module):
    """Whether a model's answer lies in some classes: who is made to get there counts as misclassified.

    Args:
        model: gives logits N x K.
        wanted: the classes, bool K; some, and not all.
        smooth: give what all logits of a side weigh together, for attacks to climb by; who got there is told by the
            largest alone.

    Raises:
        ValueError: no class is wanted, or all are.
    """

    wanted: torch.Tensor

    def __init__(self, model: nn.Module, wanted: torch.Tensor, *, smooth: bool = False) -> None:
        super().__init__()
        if not wanted.any() or wanted.all():
            raise ValueError(f"some classes must be wanted and some not, not {wanted.tolist()}")
        self.model, self.smooth = model, smooth
        self.register_buffer("wanted", wanted)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The largest logit outside and the largest inside, or the logarithm of the sum of exponentials, N x 2."""
        logits = as_logits(self.model(images))
        sides = logits[:, ~self.wanted], logits[:, self.wanted]
        return torch.stack([side.logsumexp(1) if self.smooth else side.amax(1) for side in sides], 1)


def log_odds(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Logarithm of the odds of being in a set of classes, N; 0 for an empty row.

    Args:
        logits: N x K.
        wanted: bool N x K, with at least one class outside.
    """
    any_place = wanted.any(1)
    # an empty row asks for class 0 instead and is then left out: the logarithm of nothing has no gradient
    safe = wanted | (~any_place[:, None] & (torch.arange(logits.shape[1], device=logits.device) == 0))
    inside = logits.masked_fill(~safe, -torch.inf).logsumexp(1)
    outside = logits.masked_fill(safe, -torch.inf).logsumexp(1)
    return (inside - outside) * any_place


def towards(wanted: torch.Tensor) -> Loss:
    """A loss that rises as the answer moves into a set of classes, whatever the right one is."""
    return lambda logits, _: log_odds(logits, wanted)


def targeted_pgd(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    target: str | Sequence[int],
    eps: float,
    alpha: float | None = None,
    steps: int = 10,
    random_start: bool = True,
    norm: str = "linf",
    generator: Draws = None,
    mask: torch.Tensor | None = None,
    assume_checked: bool = False,
) -> torch.Tensor:
    """PGD towards classes; without random start the iterative targeted method of Kurakin et al. (2017,
    arXiv:1607.02533), but for the least likely class only where ``target`` says so.

    Args:
        target: see :func:`target_mask`; an image that has nowhere to go comes back as it is.
        model, images, labels, eps, alpha, steps, random_start, norm, generator, mask, assume_checked: see
            :func:`utils.attacks.gradient.pgd`.

    Raises:
        TypeError, ValueError: see :func:`utils.attacks.gradient.pgd` and :func:`target_mask`.
    """
    check_eps(eps, norm)
    check_batch(model, images, labels)
    if not len(images):
        return images
    with attack_mode(model), torch.no_grad():
        logits = as_logits(model(images))
    if not assume_checked:
        check_logits(logits, labels)
    wanted = target_mask(check_target(target), logits, labels)
    found = pgd(
        model,
        images,
        labels,
        eps=eps,
        alpha=alpha,
        steps=steps,
        random_start=random_start,
        loss=towards(wanted),
        norm=norm,
        generator=generator,
        mask=mask,
        assume_checked=True,
    )
    return torch.where(wanted.any(1)[:, None, None, None], found, images)
