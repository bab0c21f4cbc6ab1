"""What one training step minimises: one small object a recipe. ``RECIPES`` names those that harden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from utils.attacks.balls import Draws, draw, random_point
from utils.attacks.gradient import Loss, ascent, cross_entropy, default_alpha, margin, pgd
from utils.core.checks import choice, number, whole
from utils.core.modes import attack_mode
from utils.core.radii import check_eps

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Outcome = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Step:
    """What an objective may know of the training step that it is called in.

    Attributes:
        criterion: mean loss of logits N x K and labels N.
        progress: share of the training that is done, 0..1.
        draws: source of random starts, see :data:`utils.attacks.gradient.Draws`.
        attacked: the model without any wrapper for several processes.
    """

    criterion: Criterion
    progress: float
    draws: Draws
    attacked: nn.Module


@dataclass(frozen=True)
class Standard:
    """Cross-entropy on clean images."""

    name: ClassVar[str] = "standard"
    #: Whether :meth:`attack` changes the images.
    attacks: ClassVar[bool] = False

    def attack(self, images: torch.Tensor, labels: torch.Tensor, step: Step) -> torch.Tensor:
        """The images that the step trains on beside the clean ones, N x C x H x W in [0, 1].

        Args:
            images: float tensor N x C x H x W in [0, 1].
            labels: int64 tensor N.
        """
        return images

    def loss(
        self, model: nn.Module, images: torch.Tensor, attacked: torch.Tensor, labels: torch.Tensor, step: Step
    ) -> Outcome:
        """Loss and the logits N x K by which the step's accuracy is counted.

        Args:
            model: in train mode, possibly wrapped for several processes.
            images, attacked: float tensors N x C x H x W in [0, 1]; ``attacked`` is what :meth:`attack` gave.
            labels: int64 tensor N.
        """
        logits = model(images)
        return step.criterion(logits, labels), logits

    def multi_step(self) -> Standard:
        """The recipe to go on with where this one's attack was too weak to teach anything."""
        return self

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Noisy(Standard):
    """Cross-entropy on images with Gaussian noise, for randomised smoothing (Cohen et al., 2019, arXiv:1902.02918).

    Attributes:
        sigma: standard deviation of the noise on each pixel; noisy images may leave [0, 1].
    """

    sigma: float
    name: ClassVar[str] = "noisy"

    def __post_init__(self) -> None:
        number("sigma", self.sigma, above=0)

    def loss(
        self, model: nn.Module, images: torch.Tensor, attacked: torch.Tensor, labels: torch.Tensor, step: Step
    ) -> Outcome:
        """See :meth:`Standard.loss`."""
        noise = draw(torch.randn, images.shape, step.draws).to(images)
        logits = model(images + self.sigma * noise)
        return step.criterion(logits, labels), logits


@dataclass(frozen=True, kw_only=True)
class Hardening(Standard):
    """What all hardening recipes share: PGD on the cross-entropy, at a strength that grows.

    Attributes:
        eps: radius in [0, 1] at the end of the ramp.
        alpha: PGD step size; None takes 2.5 * eps / steps.
        steps: PGD steps a training step.
        ramp: share of the training over which eps grows linearly from 0; hardening a clean
            model at full strength from the first step can fail outright.
        curriculum: share of the training over which the number of steps grows from 1 to ``steps``
            (Cai et al., 2018, arXiv:1805.04807); 0 takes all of them at once.
    """

    attacks: ClassVar[bool] = True

    eps: float
    alpha: float | None = None
    steps: int = 3
    ramp: float = 0.3
    curriculum: float = 0.0

    def __post_init__(self) -> None:
        if check_eps(self.eps) == 0:
            raise ValueError("hardening needs a radius eps above 0, for instance 2/255; train without attack instead")
        if self.alpha is not None:
            number("alpha", self.alpha, above=0, most=1)
        whole("steps", self.steps, 1)
        for name in ("ramp", "curriculum"):
            number(name, getattr(self, name), least=0, most=1)

    def strength(self, progress: float) -> dict[str, Any]:
        """``eps``, ``alpha`` and ``steps`` after a share ``progress`` of the training."""
        grown = min(1.0, progress / self.curriculum) if self.curriculum else 1.0
        steps = 1 + round((self.steps - 1) * grown)
        share = min(1.0, progress / self.ramp) if self.ramp else 1.0
        # fewer steps go as far together
        alpha = default_alpha(self.eps, steps) if self.alpha is None else self.alpha * self.steps / steps
        return {"eps": self.eps * share, "alpha": alpha * share, "steps": steps}

    def attack(self, images: torch.Tensor, labels: torch.Tensor, step: Step) -> torch.Tensor:
        """See :meth:`Standard.attack`."""
        return pgd(
            step.attacked,
            images,
            labels,
            loss=self.inner_loss(images, step),
            generator=step.draws,
            assume_checked=True,
            **self.strength(step.progress),
        )

    def inner_loss(self, images: torch.Tensor, step: Step) -> Loss:
        """What the attack climbs."""
        return cross_entropy

    def multi_step(self) -> Hardening:
        """See :meth:`Standard.multi_step`: more steps."""
        return replace(self, steps=max(3, 2 * self.steps), alpha=None, curriculum=0.0)


@dataclass(frozen=True, kw_only=True)
class Adversarial(Hardening):
    """Weighted adversarial training: (1 - w) * CE(clean) + w * CE(attacked).

    With w = 1 it is the saddle point of Madry et al., 2018 (arXiv:1706.06083, equation 2.1).

    Attributes:
        adv_weight: w, in (0, 1]; with 1 the clean half is skipped.
    """

    adv_weight: float = 1.0
    name: ClassVar[str] = "adversarial"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("adv_weight", self.adv_weight, above=0, most=1)

    def loss(
        self, model: nn.Module, images: torch.Tensor, attacked: torch.Tensor, labels: torch.Tensor, step: Step
    ) -> Outcome:
        """See :meth:`Standard.loss`; the logits are those of the attacked images, here and in all other recipes."""
        if self.adv_weight == 1:
            logits = model(attacked)
            return step.criterion(logits, labels), logits
        clean, logits = both_halves(model, images, attacked)
        return (1 - self.adv_weight) * step.criterion(clean, labels) + self.adv_weight * step.criterion(
            logits, labels
        ), logits


def both_halves(model: nn.Module, images: torch.Tensor, attacked: torch.Tensor) -> Outcome:
    """Logits of clean and of attacked images from one pass, which gives them the same BatchNorm statistics."""
    return model(torch.cat([images, attacked])).float().chunk(2)


def divergence(clean: torch.Tensor, attacked: torch.Tensor) -> torch.Tensor:
    """KL(softmax(clean) || softmax(attacked)) a sample, of logits N x K."""
    return F.kl_div(attacked.log_softmax(1), clean.log_softmax(1), reduction="none", log_target=True).sum(1)


@dataclass(frozen=True, kw_only=True)
class Trades(Hardening):
    """TRADES: CE(clean) + beta * KL(clean || attacked) (Zhang et al., 2019, arXiv:1901.08573, equation 5).

    The attack climbs the same divergence. It starts anywhere in the ball, where the authors' code starts
    beside the image.

    Attributes:
        beta: weight of the divergence, 1/lambda in the paper.
    """

    beta: float = 6.0
    name: ClassVar[str] = "trades"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("beta", self.beta, above=0)

    def inner_loss(self, images: torch.Tensor, step: Step) -> Loss:
        """See :meth:`Hardening.inner_loss`."""
        with attack_mode(step.attacked), torch.no_grad():
            clean = step.attacked(images).float()
        return lambda logits, _: divergence(clean, logits)

    def loss(
        self, model: nn.Module, images: torch.Tensor, attacked: torch.Tensor, labels: torch.Tensor, step: Step
    ) -> Outcome:
        """See :meth:`Standard.loss`."""
        clean, logits = both_halves(model, images, attacked)
        return step.criterion(clean, labels) + self.beta * divergence(clean, logits).mean(), logits


@dataclass(frozen=True, kw_only=True)
class Mart(Hardening):
    """MART: misclassified images count more (Wang et al., 2020, ICLR, openreview rklOg6EFwS, the MART risk).

    CE(attacked) - log(1 - p_wrong(attacked)) + beta * KL(clean || attacked) * (1 - p_true(clean)), where p_wrong is
    the highest probability of a wrong class.

    Attributes:
        beta: weight of the divergence, lambda in the paper.
    """

    beta: float = 5.0
    name: ClassVar[str] = "mart"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("beta", self.beta, above=0)

    def loss(
        self, model: nn.Module, images: torch.Tensor, attacked: torch.Tensor, labels: torch.Tensor, step: Step
    ) -> Outcome:
        """See :meth:`Standard.loss`."""
        clean, logits = both_halves(model, images, attacked)
        log_p = logits.log_softmax(1)
        # the highest wrong probability is the true one's times exp(margin)
        wrong = (log_p.gather(1, labels[:, None])[:, 0] + margin(logits, labels)).exp()
        unsure = 1 - clean.softmax(1).gather(1, labels[:, None])[:, 0]
        boosted = step.criterion(logits, labels) - torch.log1p(-wrong.clamp(max=1 - 1e-6)).mean()
        return boosted + self.beta * (divergence(clean, logits) * unsure).mean(), logits


@dataclass(frozen=True, kw_only=True)
class NFgsm(Hardening):
    """N-FGSM: one step from strong noise, not projected back (de Jorge et al., 2022, arXiv:2202.01181, section 4).

    Attributes:
        alpha: step size; None takes eps.
        steps: always 1.
        noise: half width of the uniform noise in units of eps, k in the paper.
    """

    steps: int = 1
    noise: float = 2.0
    name: ClassVar[str] = "n_fgsm"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("noise", self.noise, least=0)
        if self.steps != 1:
            raise ValueError(f"n_fgsm takes one step, not {self.steps}")

    def attack(self, images: torch.Tensor, labels: torch.Tensor, step: Step) -> torch.Tensor:
        """See :meth:`Standard.attack`; the result is up to (noise + 1) * eps away from the image."""
        strength = self.strength(step.progress)
        noisy = random_point(images, min(1.0, self.noise * strength["eps"]), "linf", step.draws)
        with attack_mode(step.attacked):
            gradient = ascent(step.attacked, noisy, labels, cross_entropy).gradient
        size = strength["eps"] if self.alpha is None else strength["alpha"]
        return (noisy + size * gradient.sign()).clamp(0, 1)

    def loss(
        self, model: nn.Module, images: torch.Tensor, attacked: torch.Tensor, labels: torch.Tensor, step: Step
    ) -> Outcome:
        """See :meth:`Standard.loss`."""
        logits = model(attacked)
        return step.criterion(logits, labels), logits

    def multi_step(self) -> Hardening:
        """See :meth:`Hardening.multi_step`."""
        return Adversarial(eps=self.eps, steps=3, adv_weight=1.0, ramp=self.ramp)


#: Recipes that harden, by the name that the notebooks' parameter ``recipe`` takes.
RECIPES: dict[str, type[Hardening]] = {kind.name: kind for kind in (Adversarial, Trades, Mart, NFgsm)}


def make_objective(recipe: str, **values: Any) -> Hardening:
    """The recipe of this name, from those of ``values`` that it knows; ``beta`` None and n_fgsm's steps are its own.

    Raises:
        ValueError: an unknown recipe, or a bad value.
    """
    choice("recipe", recipe, RECIPES)
    known = {field.name for field in fields(RECIPES[recipe])} - ({"steps"} if recipe == NFgsm.name else set())
    return RECIPES[recipe](**{name: value for name, value in values.items() if name in known and value is not None})
