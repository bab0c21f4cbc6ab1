"""Auto-PGD: projected gradient ascent with momentum that halves each sample's step size by itself.

Croce and Hein, 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", arXiv:2003.01690, Algorithm 1 and equations (3) to (6).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn

from utils.attacks.balls import Draws, project, random_point, steepest
from utils.attacks.given import as_logits, check_batch, check_logits
from utils.attacks.gradient import Ascent, ascent, check_gradient, named_loss
from utils.core.checks import whole
from utils.core.modes import attack_mode
from utils.core.radii import check_eps

_MOMENTUM = 0.75  # alpha of Algorithm 1: share of the new step, the rest continues the last one
_RISING = 0.75  # rho: halve the step where fewer than this share of the steps raised the loss
_FIRST, _SHRINK, _SHORTEST = 0.22, 0.03, 0.06  # checkpoints as shares of all steps


def targeted_dlr(logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Targeted difference of logits ratio, equation (6); rises as the target overtakes the right class.

    The ratio needs four classes. With three its denominator is that of the untargeted ratio, equation (3); with two
    the difference stands alone. The attack compares losses and takes signs, so it does not mind the scale.

    Args:
        logits: N x K.
        labels, targets: int64 tensors N; the right class and another one.
    """
    right, wanted = (logits.gather(1, index[:, None]).squeeze(1) for index in (labels, targets))
    ranked = logits.sort(dim=1, descending=True).values
    if logits.shape[1] == 2:
        return wanted - right
    low = ranked[:, 2] if logits.shape[1] == 3 else (ranked[:, 2] + ranked[:, 3]) / 2
    return (wanted - right) / (ranked[:, 0] - low + 1e-12)


def checkpoints(steps: int) -> set[int]:
    """Steps after which step sizes are reconsidered: they come closer to each other (section 3.1)."""
    found, last, gap = set(), 0, max(int(_FIRST * steps), 1)
    while last + gap <= steps:
        last += gap
        found.add(last)
        gap = max(gap - max(int(_SHRINK * steps), 1), max(int(_SHORTEST * steps), 1))
    return found


@dataclass
class _State:
    """What Algorithm 1 remembers of each of N samples; every entry has N rows."""

    index: torch.Tensor
    clean: torch.Tensor
    labels: torch.Tensor
    targets: torch.Tensor
    here: torch.Tensor
    before: torch.Tensor
    gradient: torch.Tensor
    loss: torch.Tensor
    best: torch.Tensor
    best_gradient: torch.Tensor
    best_loss: torch.Tensor
    step_size: torch.Tensor
    rises: torch.Tensor
    halved: torch.Tensor
    checked_loss: torch.Tensor

    def keep(self, rows: torch.Tensor) -> None:
        for entry in fields(self):
            setattr(self, entry.name, getattr(self, entry.name)[rows])


def apgd(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    eps: float,
    steps: int = 100,
    loss: str = "ce",
    norm: str = "linf",
    targets: torch.Tensor | None = None,
    generator: Draws = None,
    assume_checked: bool = False,
) -> torch.Tensor:
    """Auto-PGD from a random start. A sample is left as soon as it fools the model.

    Args:
        model: maps images to logits, normalisation inside.
        images: float tensor N x C x H x W in [0, 1].
        labels: int64 tensor N, the true classes.
        eps: radius, in [0, 1] for L-infinity.
        steps: at least 1.
        loss: a key of :data:`utils.attacks.gradient.LOSSES`; not used with targets.
        norm: ``linf`` or ``l2``.
        targets: int64 tensor N of classes to reach, for the targeted form; any wrong answer counts.
        generator: CPU generator that makes the start reproducible, or one for each sample.
        assume_checked: see :func:`utils.attacks.gradient.fgsm`.

    Returns:
        adversarial images of the same shape, in [0, 1] and within ``eps``; where the model was not
        fooled, those with the highest loss.

    Raises:
        TypeError, ValueError: see :func:`utils.attacks.gradient.pgd` and :func:`utils.core.radii.check_eps`; also
            steps below 1 or a NaN gradient.
    """
    check_eps(eps, norm)
    whole("steps", steps, 1)
    check_batch(model, images, labels)
    check = not assume_checked
    with attack_mode(model):
        start = random_point(images, eps, norm, generator)
        if targets is not None:
            return _run(model, targeted_dlr, images.detach(), labels, targets, start, eps, steps, norm, check)
        plain = named_loss(loss)
        return _run(model, lambda x, y, _: plain(x, y), images.detach(), labels, labels, start, eps, steps, norm, check)


def apgd_targeted(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    eps: float,
    steps: int = 100,
    n_targets: int = 3,
    norm: str = "linf",
    generator: Draws = None,
    assume_checked: bool = False,
) -> torch.Tensor:
    """APGD-T: :func:`apgd` towards each of the likeliest wrong classes in turn, on :func:`targeted_dlr`.

    Args:
        n_targets: how many classes to try; at most K - 1 are.
        generator: CPU generator that makes the starts reproducible, or one for each sample.
        model, images, labels, eps, steps, norm, assume_checked: see :func:`apgd`.

    Returns:
        for each sample the first image that fooled the model, or else that of the last target.

    Raises:
        TypeError, ValueError: see :func:`apgd`.
    """
    check_eps(eps, norm)
    check_batch(model, images, labels)
    with attack_mode(model), torch.no_grad():
        logits = as_logits(model(images))
    if not assume_checked:
        check_logits(logits, labels)
    wrong = logits.scatter(1, labels[:, None], -torch.inf).argsort(dim=1, descending=True)
    result, active = images.detach().clone(), torch.arange(len(images), device=images.device)
    for rank in range(min(n_targets, logits.shape[1] - 1)):
        draws = [generator[i] for i in active.tolist()] if isinstance(generator, Sequence) else generator
        result[active] = apgd(
            model,
            images[active],
            labels[active],
            eps=eps,
            steps=steps,
            norm=norm,
            targets=wrong[active, rank],
            generator=draws,
            assume_checked=True,
        )
        with attack_mode(model), torch.no_grad():
            active = active[model(result[active]).argmax(1) == labels[active]]
        if not len(active):
            break
    return result


Criterion = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _run(
    model: nn.Module,
    criterion: Criterion,
    images: torch.Tensor,
    labels: torch.Tensor,
    targets: torch.Tensor,
    start: torch.Tensor,
    eps: float,
    steps: int,
    norm: str,
    check: bool,
) -> torch.Tensor:
    def look(points: torch.Tensor, right: torch.Tensor, wanted: torch.Tensor, check: bool = False) -> Ascent:
        return ascent(model, points, right, lambda logits, y: criterion(logits, y, wanted), check=check)

    result = start.clone()
    found = look(start, labels, targets, check)
    check_gradient(found.gradient)
    n = len(images)
    state = _State(
        index=torch.arange(n, device=images.device),
        clean=images,
        labels=labels,
        targets=targets,
        here=start,
        before=start,
        gradient=found.gradient,
        loss=found.loss,
        best=start,
        best_gradient=found.gradient,
        best_loss=found.loss,
        step_size=torch.full_like(found.loss, 2 * eps),
        rises=torch.zeros_like(found.loss),
        halved=torch.ones_like(found.fooled),
        checked_loss=found.loss,
    )
    state.keep(~found.fooled)
    check_at, since = checkpoints(steps), 0
    for step in range(1, steps + 1):
        if not len(state.index):
            return result
        _move(state, eps, 1.0 if step == 1 else _MOMENTUM, norm)
        found = look(state.here, state.labels, state.targets)
        check_gradient(found.gradient)
        _remember(state, found)
        # the best so far is also what is left at the end of an attack that fails
        result[state.index] = torch.where(_wide(found.fooled), state.here, state.best)
        state.keep(~found.fooled)
        since += 1
        if step in check_at:
            _halve(state, since)
            since = 0
    return result


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


def _move(state: _State, eps: float, share: float, norm: str) -> None:
    def inside(point: torch.Tensor) -> torch.Tensor:
        return (state.clean + project(point - state.clean, eps, norm)).clamp(0, 1)

    ahead = inside(state.here + _wide(state.step_size) * steepest(state.gradient, norm))
    momentum = (1 - share) * (state.here - state.before)
    state.before, state.here = state.here, inside(state.here + share * (ahead - state.here) + momentum)


def _remember(state: _State, found: Ascent) -> None:
    state.rises = state.rises + (found.loss > state.loss)
    state.gradient, state.loss = found.gradient, found.loss
    better = found.loss > state.best_loss
    state.best = torch.where(_wide(better), state.here, state.best)
    state.best_gradient = torch.where(_wide(better), found.gradient, state.best_gradient)
    state.best_loss = torch.where(better, found.loss, state.best_loss)


def _halve(state: _State, since: int) -> None:
    """Conditions 1 and 2 of section 3.1: too few rises, or no better loss and no halving since the last check."""
    stuck = ~state.halved & (state.best_loss <= state.checked_loss)
    halve = (state.rises <= _RISING * since) | stuck
    state.step_size = torch.where(halve, state.step_size / 2, state.step_size)
    state.here = torch.where(_wide(halve), state.best, state.here)
    state.gradient = torch.where(_wide(halve), state.best_gradient, state.gradient)
    state.halved, state.checked_loss = halve, state.best_loss
    state.rises = torch.zeros_like(state.rises)
