"""White-box L-infinity and L2 attacks on models that take images in [0, 1].

Only the gradient of the input is computed: parameters are frozen while an attack runs, which
leaves their ``.grad`` alone and saves a third of the work.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from utils.attacks.balls import Draws, project, random_point, steepest
from utils.attacks.given import as_logits, check_batch, check_logits
from utils.core.checks import choice, whole
from utils.core.modes import attack_mode
from utils.core.radii import check_eps

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy a sample. Shapes N x K and N to N."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Best wrong logit minus the right one (Carlini and Wagner, 2017, f6). Positive when fooled.

    Unlike cross-entropy its gradient does not vanish where the model is very sure.
    """
    right = logits.gather(1, labels[:, None]).squeeze(1)
    wrong = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return wrong - right


def negative_score(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Minus the right class's output: for models that give sums of log-probabilities instead of logits."""
    return -logits.gather(1, labels[:, None]).squeeze(1)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "nll": negative_score}


def default_alpha(eps: float, steps: int) -> float:
    """Step size 2.5 * eps / steps (Madry et al., 2018): the ball's edge is reached, then searched."""
    return 2.5 * eps / steps


def named_loss(name: str) -> Loss:
    """A loss of ``LOSSES``.

    Raises:
        ValueError: no such loss.
    """
    return LOSSES[choice("loss", name, LOSSES)]


@dataclass
class Ascent:
    """What one forward and backward pass tells of N images.

    Attributes:
        gradient: of the loss with respect to each image, N x C x H x W, in the images' dtype.
        loss: N.
        fooled: bool tensor N, whether the model's answer is wrong.
    """

    gradient: torch.Tensor
    loss: torch.Tensor
    fooled: torch.Tensor


def ascent(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, loss: Loss, *, check: bool = False) -> Ascent:
    """One forward and one backward pass to the images; parameters' ``.grad`` stays as it is.

    Args:
        check: look at the answers with :func:`check_logits` before anything is made of them.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = images.detach().clone().requires_grad_(True)
        logits = as_logits(model(leaf))
        if check:
            check_logits(logits.detach(), labels)
        # what was made in inference mode cannot be kept for the gradient
        values = loss(logits, labels.clone() if labels.is_inference() else labels)
        gradient = torch.autograd.grad(values.sum(), leaf, allow_unused=True)[0]
    if check and len(images) and (gradient is None or not gradient.any()):
        warnings.warn(
            "the model gives no input gradient (it cuts it off, or rounds): attacks by gradients change nothing, and "
            "what they leave is no robustness",
            stacklevel=3,
        )
    # a model that cuts its gradient off, by rounding for instance, leaves none at all
    gradient = torch.zeros_like(images) if gradient is None else gradient
    return Ascent(gradient, values.detach(), logits.detach().argmax(1) != labels)


def check_gradient(gradient: torch.Tensor) -> None:
    """A NaN gradient would leave the image where it is and pass for robustness."""
    if not gradient.isfinite().all():
        raise ValueError("the model's input gradient is NaN or infinite; its weights or logits are damaged")


def fgsm(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    eps: float,
    loss: str = "ce",
    norm: str = "linf",
    assume_checked: bool = False,
) -> torch.Tensor:
    """Fast Gradient Sign Method (Goodfellow et al., 2015, arXiv:1412.6572); with L2 the gradient is scaled instead.

    Args:
        model: maps images to logits, normalisation inside.
        images: float tensor N x C x H x W in [0, 1].
        labels: int64 tensor N, the true classes.
        eps: radius, in [0, 1] for L-infinity.
        loss: a key of ``LOSSES``.
        norm: ``linf`` or ``l2``.
        assume_checked: the model is known to give logits of all classes of ``labels``, as in training.

    Returns:
        adversarial images of the same shape, in [0, 1] and within ``eps``.

    Raises:
        TypeError, ValueError: see :func:`check_batch`, :func:`check_logits` and :func:`check_eps`; also a NaN gradient.
    """
    check_eps(eps, norm)
    check_batch(model, images, labels)
    with attack_mode(model):
        gradient = ascent(model, images, labels, named_loss(loss), check=not assume_checked).gradient
    check_gradient(gradient)
    return (images + eps * steepest(gradient, norm)).clamp(0, 1).detach()


def pgd(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    eps: float,
    alpha: float | None = None,
    steps: int = 10,
    restarts: int = 1,
    random_start: bool = True,
    loss: str | Loss = "ce",
    norm: str = "linf",
    stop_when_fooled: bool = False,
    batch_size: int | None = None,
    generator: Draws = None,
    mask: torch.Tensor | None = None,
    assume_checked: bool = False,
) -> torch.Tensor:
    """Projected Gradient Descent (Madry et al., 2018, arXiv:1706.06083).

    Args:
        model: maps images to logits, normalisation inside.
        images: float tensor N x C x H x W in [0, 1].
        labels: int64 tensor N, the true classes.
        eps: radius, in [0, 1] for L-infinity.
        alpha: step size; None takes :func:`default_alpha`. A size that cannot reach the
            edge of the ball (alpha * steps < eps) warns: it measures the step size, not the model.
        steps: number of gradient steps, at least 1.
        restarts: number of independent starts, at least 1. Of several, each sample keeps the one
            that fools the model, or else the one with the highest loss.
        random_start: start at random in the ball; otherwise at the image.
        loss: a key of ``LOSSES``, or a function of logits N x K and labels N that gives N values to climb.
        norm: ``linf`` or ``l2``.
        stop_when_fooled: leave a sample at the first iterate that fools the model and spend no more
            steps or starts on it. For measuring, where one such image is enough; never for training.
        batch_size: with ``stop_when_fooled``, images a pass: where one is done, the next sample or start takes its
            place, so that passes stay full. None takes as many as there are samples.
        generator: CPU generator that makes random starts reproducible, or one for each sample.
        mask: what may be changed, broadcast to the images, 1 where and 0 where not; not with ``stop_when_fooled``.
        assume_checked: see :func:`fgsm`.

    Returns:
        adversarial images of the same shape, in [0, 1] and within ``eps``.

    Raises:
        TypeError, ValueError: see :func:`check_batch`, :func:`check_logits` and :func:`check_eps`; also steps or
            restarts below 1, a step size that is not positive, a mask that does not fit or one with
            ``stop_when_fooled``, or a NaN gradient.
    """
    check_eps(eps, norm)
    whole("steps", steps, 1)
    whole("restarts", restarts, 1)
    if batch_size is not None:
        whole("batch_size", batch_size, 1)
    check_batch(model, images, labels)
    if mask is not None and stop_when_fooled:
        raise ValueError("a mask belongs to its image, and stop_when_fooled moves images about: leave one of them out")
    check_mask(mask, images)
    alpha = check_alpha(alpha, eps, steps, norm)
    rule = named_loss(loss) if isinstance(loss, str) else loss
    climb = _Climb(model, eps, alpha, steps, rule, norm, not assume_checked, mask)
    begin = partial(_start, eps=eps, norm=norm, random_start=random_start, mask=mask)
    images = images.detach()
    with attack_mode(model):
        if stop_when_fooled:
            return _until_fooled(climb, images, labels, begin, restarts, batch_size or len(images), generator)
        best = _ascend(climb, images, labels, begin(images, draws=generator))
        if restarts == 1:
            return best
        best_score = _score(*_answer(climb, best, labels))
        for _ in range(restarts - 1):
            found = _ascend(climb, images, labels, begin(images, draws=generator))
            score = _score(*_answer(climb, found, labels))
            best[score > best_score] = found[score > best_score]
            best_score = torch.maximum(score, best_score)
    return best


def check_mask(mask: torch.Tensor | None, images: torch.Tensor) -> None:
    """Check where an attack may change its images.

    Raises:
        ValueError: a mask of another shape, or of other numbers than 0 and 1.
    """
    if mask is None:
        return
    try:
        fits = torch.broadcast_shapes(mask.shape, images.shape) == images.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"a mask of {tuple(mask.shape)} does not fit images of {tuple(images.shape)}")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("a mask is 1 where an image may be changed and 0 elsewhere; this one holds other numbers")


def check_alpha(alpha: float | None, eps: float, steps: int, norm: str) -> float:
    """A step size, or :func:`default_alpha` without one; warns where ``steps`` of it cannot cross the ball.

    Raises:
        ValueError: not a positive number, or above 1 in L-infinity.
    """
    if alpha is None:
        return default_alpha(eps, steps)
    if not (0 < alpha <= (1 if norm == "linf" else float("inf")) or eps == 0):
        raise ValueError(f"alpha must be in (0, 1] pixel units, not {alpha}")
    if alpha * steps < eps * (1 - 1e-6):
        warnings.warn(
            f"alpha * steps = {alpha * steps:.2g} is less than eps = {eps:.2g}: the attack cannot reach "
            "the edge of the ball and will overstate robustness. Use alpha >= 2.5 * eps / steps.",
            stacklevel=3,
        )
    return alpha


@dataclass(frozen=True)
class _Climb:
    """Settings of one PGD."""

    model: nn.Module
    eps: float
    alpha: float
    steps: int
    loss: Loss
    norm: str
    check: bool
    mask: torch.Tensor | None = None

    def step(self, here: torch.Tensor, clean: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The next iterate."""
        gradient = gradient if self.mask is None else gradient * self.mask
        shift = project(here + self.alpha * steepest(gradient, self.norm) - clean, self.eps, self.norm)
        return (clean + shift).clamp(0, 1)


def _start(
    images: torch.Tensor, *, eps: float, norm: str, random_start: bool, draws: Draws, mask: torch.Tensor | None = None
) -> torch.Tensor:
    if not random_start:
        return images.clone()
    start = random_point(images, eps, norm, draws)
    return start if mask is None else images + (start - images) * mask


def _ascend(climb: _Climb, images: torch.Tensor, labels: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    finite = torch.ones((), dtype=torch.bool, device=images.device)
    for step in range(climb.steps):
        gradient = ascent(climb.model, here, labels, climb.loss, check=climb.check and step == 0).gradient
        finite &= gradient.isfinite().all()
        here = climb.step(here, images, gradient)
    # read once, for a GPU would wait at every step
    check_gradient(torch.where(finite, 0.0, torch.nan))
    return here


def _until_fooled(
    climb: _Climb,
    images: torch.Tensor,
    labels: torch.Tensor,
    begin: Callable[..., torch.Tensor],
    restarts: int,
    batch_size: int,
    draws: Draws,
) -> torch.Tensor:
    """PGD whose passes are filled up from a queue of rows: every sample's first start, then every second one, ...

    A row leaves the pass after its last step, or when one of its sample's rows has fooled the model.
    """
    result, best = images.clone(), [-math.inf] * len(images)
    standing = torch.ones(len(images), dtype=torch.bool)
    waiting = torch.arange(len(images)).repeat(restarts)
    # of each row in the pass: its sample and the steps it has made, both on the CPU, and the point it has reached
    owner, age, here, check = waiting[:0], waiting[:0], images[:0], climb.check

    def settle(rows: torch.Tensor, score: torch.Tensor, fooled: torch.Tensor) -> None:
        for row, sample, value in zip(rows.tolist(), owner[rows].tolist(), score.tolist()):
            if value > best[sample]:
                best[sample], result[sample] = value, here[row]
        standing[owner[rows[fooled]]] = False

    while True:
        waiting = waiting[standing[waiting]]
        room = batch_size - len(owner)
        fresh, waiting = waiting[:room], waiting[room:]
        if len(fresh):
            own = [draws[sample] for sample in fresh.tolist()] if isinstance(draws, Sequence) else draws
            owner, age = torch.cat([owner, fresh]), torch.cat([age, torch.zeros_like(fresh)])
            here = torch.cat([here, begin(images[fresh], draws=own)])
        if not len(owner):
            return result
        found, check = ascent(climb.model, here, labels[owner], climb.loss, check=check), False
        check_gradient(found.gradient)
        fooled = found.fooled.cpu()
        rows = torch.nonzero(fooled)[:, 0]
        settle(rows, _score(found.loss, found.fooled)[rows], fooled[rows])
        here, age = climb.step(here, images[owner], found.gradient), age + 1
        last = torch.nonzero(standing[owner] & (age == climb.steps))[:, 0]
        if restarts == 1:
            result[owner[last]] = here[last]
        elif len(last):
            loss, fooled = _answer(climb, here[last], labels[owner[last]])
            settle(last, _score(loss, fooled), fooled.cpu())
        keep = standing[owner] & (age < climb.steps)
        owner, age, here = owner[keep], age[keep], here[keep]


@torch.no_grad()
def _answer(climb: _Climb, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each image, and whether the model is fooled."""
    logits = as_logits(climb.model(images))
    return climb.loss(logits, labels), logits.argmax(1) != labels


def _score(loss: torch.Tensor, fooled: torch.Tensor) -> torch.Tensor:
    """The loss, raised beyond any finite loss where the model is fooled."""
    return loss.nan_to_num(posinf=1e30) + 1e6 * fooled
