"""Which attacks are run, with which budget, and what they may change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from utils.attacks.attack import Attack
from utils.attacks.balls import distance
from utils.core.checks import whole
from utils.core.radii import GRIDS, NORM_TITLES, check_eps
from utils.data.sets import ImageSet

GRID = GRIDS["linf"]
#: Pixels a side to which images are enlarged at most; beyond it a batch would fill any memory.
_LARGEST = 1024


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
            whole("size, the number of pixels a side,", self.size, 2, _LARGEST)

    @property
    def title(self) -> str:
        """For tables and figures."""
        space = "grey, native" if self.size is None else f"3 untied planes, {self.size} px"
        return f"{NORM_TITLES[self.norm]}, {space}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with the title, for records."""
        return {"title": self.title, "norm": self.norm, "size": self.size}

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
