"""Which attacks are run, with which budget, and what they may change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from utils.attacks.apgd import apgd, apgd_targeted
from utils.attacks.gradient import LOSSES, Draws, distance, fgsm, pgd, random_point, steepest
from utils.attacks.library import auto_attack, check_autoattack, square
from utils.core.checks import choice, number, whole
from utils.core.radii import GRIDS, check_eps
from utils.data.sets import ImageSet

GRID = GRIDS["linf"]

#: Passes of AutoAttack's parts, about: APGD, three targets each of APGD and of FAB, and half of Square's 5,000 queries,
#: which need no gradient.
AUTOATTACK_STEPS = 3500

_TITLES = {
    "fgsm": "FGSM",
    "pgd": "PGD-{steps}",
    "apgd": "APGD-{steps}",
    "apgd_t": "APGD-T-{steps}",
    "square": "Square-{steps}",
    "noise": "Noise",
    "autoattack": "AutoAttack",
}
_LOSS_TITLES = {"ce": "", "margin": " margin", "nll": ""}


@dataclass(frozen=True)
class Threat:
    """What an attacker may change, and how far.

    Attributes:
        norm: ``linf`` or ``l2``.
        size: None attacks the grey image at its own resolution; a number attacks three untied colour planes of
            the image enlarged to that side, as the original work did (224). An attacker can realise only the first:
            a scan has one grey plane.
    """

    norm: str = "linf"
    size: int | None = None

    def __post_init__(self) -> None:
        check_eps(0, self.norm)
        if self.size is not None:
            whole("size, the number of pixels a side,", self.size, 2)

    @property
    def title(self) -> str:
        """For tables and figures."""
        space = "grey, native" if self.size is None else f"3 untied planes, {self.size} px"
        return f"{'L-inf' if self.norm == 'linf' else 'L2'}, {space}"

    def images(self, images: ImageSet, index: torch.Tensor | slice, device: torch.device | str) -> torch.Tensor:
        """The images that are attacked, float32 in [0, 1]."""
        pixels = images.pixels(index, device)
        if self.size is None:
            return pixels
        large = F.interpolate(pixels, size=(self.size, self.size), mode="bilinear", antialias=True)
        return large.expand(-1, 3, -1, -1).clamp(0, 1).contiguous()

    def measure(self, shift: torch.Tensor) -> torch.Tensor:
        """Size of each perturbation, N x C x H x W to N."""
        return distance(shift, self.norm)


@dataclass(frozen=True)
class Attack:
    """An attack and its budget; the radius is given when it runs.

    Attributes:
        name: ``fgsm``, ``pgd``, ``apgd``, ``apgd_t`` (targeted), ``square`` (black box), ``noise`` (random signs:
            no attack, but what one must beat) or ``autoattack``.
        steps: gradient steps, or queries of ``square``.
        restarts: independent starts.
        alpha, loss, random_start: see :func:`utils.attacks.gradient.pgd`.
        targets: classes that ``apgd_t`` tries.
        stop_when_fooled: see :func:`utils.attacks.gradient.pgd`.
        surrogate: name of another model whose gradient is used; "" attacks the model itself.
    """

    name: str = "pgd"
    steps: int = 20
    restarts: int = 1
    alpha: float | None = None
    loss: str = "ce"
    random_start: bool = True
    targets: int = 3
    stop_when_fooled: bool = False
    surrogate: str = ""

    def __post_init__(self) -> None:
        if self.name not in _TITLES:
            raise ValueError(f"attack must be one of {', '.join(_TITLES)}, not {self.name!r}")
        choice("loss", self.loss, LOSSES)
        for name in ("steps", "restarts", "targets"):
            whole(name, getattr(self, name), 1)
        if self.alpha is not None:
            number("alpha", self.alpha, above=0)

    @property
    def title(self) -> str:
        """For plots and tables."""
        times = f"{' ' if self.name == 'noise' else ''}x{self.restarts}" if self.restarts > 1 else ""
        title = _TITLES[self.name].format(steps=self.steps) + times
        title += _LOSS_TITLES[self.loss] if self.name in ("fgsm", "pgd", "apgd") else ""
        return title + (f" from {self.surrogate}" if self.surrogate else "")

    @property
    def passes(self) -> int:
        """Passes through the model for one image that nothing breaks, about: what a progress bar counts."""
        steps = {"fgsm": 1, "noise": 1, "apgd_t": self.steps * self.targets, "autoattack": AUTOATTACK_STEPS}
        gradient = 1 if self.name in ("square", "noise") else 2
        return gradient * self.restarts * steps.get(self.name, self.steps)

    @property
    def refills(self) -> bool:
        """Whether the attack drops broken images by itself and fills its passes up with the next ones."""
        return self.name == "pgd" and self.stop_when_fooled

    def rounds(self) -> Iterator[Attack]:
        """The attack as attacks between which the caller drops broken images: one a start, unless it does so itself."""
        return iter([self]) if self.refills else (replace(self, restarts=1) for _ in range(self.restarts))

    def check_classes(self, classes: int) -> None:
        """Refuse, before any work, a model with a number of classes that this attack is not defined for.

        Raises:
            ValueError: AutoAttack on fewer than four classes.
        """
        if self.name == "autoattack":
            check_autoattack(classes)

    def __call__(
        self,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        eps: float,
        norm: str = "linf",
        draws: Draws = None,
        batch_size: int | None = None,
        assume_checked: bool = False,
    ) -> torch.Tensor:
        """Adversarial images; at ``eps`` 0 the images themselves.

        ``batch_size`` bounds the images a pass of an attack that :attr:`refills`; others take all at once. For
        ``assume_checked`` see :func:`utils.attacks.gradient.fgsm`.
        """
        if check_eps(eps, norm) == 0:
            return images
        common: dict[str, Any] = {"eps": eps, "norm": norm, "assume_checked": assume_checked}
        first = draws[0] if isinstance(draws, Sequence) else draws
        seed = 0 if first is None else first.initial_seed() % 2**31
        if self.name == "fgsm":
            return fgsm(model, images, labels, loss=self.loss, **common)
        if self.name == "apgd":
            return apgd(model, images, labels, steps=self.steps, loss=self.loss, generator=draws, **common)
        if self.name == "apgd_t":
            return apgd_targeted(
                model, images, labels, steps=self.steps, n_targets=self.targets, generator=draws, **common
            )
        if self.name == "square":
            return square(model, images, labels, queries=self.steps, seed=seed, **common)
        if self.name == "autoattack":
            return auto_attack(model, images, labels, seed=seed, **common)
        if self.name == "noise":
            away = random_point(images, 1.0, norm, draws) - images
            return (images + eps * steepest(away, norm)).clamp(0, 1)
        return pgd(
            model,
            images,
            labels,
            alpha=self.alpha,
            steps=self.steps,
            restarts=self.restarts,
            random_start=self.random_start,
            loss=self.loss,
            stop_when_fooled=self.stop_when_fooled,
            batch_size=batch_size,
            generator=draws,
            **common,
        )


def _pgd(steps: int, restarts: int = 1, loss: str = "ce") -> Attack:
    return Attack("pgd", steps=steps, restarts=restarts, loss=loss, stop_when_fooled=True)


_REPORT = (
    Attack("fgsm"),
    _pgd(50, 5),
    _pgd(50, 5, "margin"),
    Attack("apgd", steps=100),
    Attack("apgd_t", steps=100),
)


def notebook_attacks(steps: int) -> tuple[Attack, ...]:
    """What the notebooks' worst case is over: FGSM, PGD on two losses, and targeted APGD.

    Without targets it would be too high: on a hardened EfficientNet the first three leave 25.6 % at 4/255, and targeted
    attacks 18.4 %.
    """
    return (Attack("fgsm"), _pgd(steps), _pgd(steps, loss="margin"), Attack("apgd_t", steps=steps))


#: Sets of attacks, cheap before dear: what one breaks, the next ones leave alone.
#: ``smoke`` only shows that everything runs; ``brief`` ranks models while they are developed; ``targeted`` comes
#: closest to ``standard`` for the least work.
SUITES: dict[str, tuple[Attack, ...]] = {
    "smoke": (Attack("fgsm"), _pgd(5), Attack("square", steps=20)),
    "quick": (Attack("fgsm"), _pgd(20)),
    "targeted": notebook_attacks(20),
    "brief": (Attack("fgsm"), _pgd(20), _pgd(20, loss="margin"), Attack("apgd_t", steps=10)),
    "standard": (*_REPORT, Attack("square", steps=1000)),
    "full": (*_REPORT, Attack("square", steps=5000), Attack("autoattack")),
}


def check_suite(name: str) -> tuple[Attack, ...]:
    """The attacks of a suite.

    Raises:
        ValueError: no such suite.
    """
    if name not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, not {name!r}")
    return SUITES[name]


def describe(attacks: Sequence[Attack]) -> list[dict[str, Any]]:
    """Attacks as plain values, with their titles."""
    return [{"title": attack.title, **asdict(attack)} for attack in attacks]
