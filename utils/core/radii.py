"""Attack radii: one notation for every command, notebook and table.

A radius is a float in the units of pixels in [0, 1]. It is typed as ``8/255`` or ``0.0314`` and shown as ``8/255``,
or as a length, ``0.5``, where the norm is L2, or as a number of pixels, ``10``, where it is L0.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Sequence
from numbers import Real

NORMS = ("linf", "l2", "l0")
#: As they stand in titles.
NORM_TITLES = {"linf": "L-inf", "l2": "L2", "l0": "L0"}
#: As they stand under tables.
NORM_SIGNS = {"linf": "L∞", "l2": "L2", "l0": "L0"}
#: Radius of the original work.
ORIGINAL_EPS = 0.005
#: Radii that are measured unless others are named. On 128 x 128 pixels an L2 length of 0.5 is one grey level a pixel.
GRIDS: dict[str, tuple[float, ...]] = {
    "linf": (0.0, 0.5 / 255, 1 / 255, ORIGINAL_EPS, 2 / 255, 4 / 255, 8 / 255),
    "l2": (0.0, 0.25, 0.5, 1.0, 2.0, 4.0),
    "l0": (0.0, 1.0, 4.0, 16.0, 64.0),
}
#: Radius of the gradient checks, which ask about steps along a gradient: there are none for L0.
CHECK_EPS = {"linf": 2 / 255, "l2": 1.0, "l0": 0.0}
#: A smaller radius than this one cannot matter: images come with 8 bits.
NEGLIGIBLE = {"linf": 0.1 / 255, "l2": 0.01, "l0": 1.0}

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


def check_norm(norm: str) -> str:
    """``norm`` if it is one of ``NORMS``.

    Raises:
        ValueError: it is not.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, not {norm!r}")
    return norm


def check_eps(eps: float, norm: str = "linf") -> float:
    """``eps`` if it is a radius: in [0, 1] for L-infinity, any length for L2, a whole number of pixels for L0.

    Raises:
        ValueError: negative, NaN, for L-infinity above 1 (pixels are in [0, 1]: write 8/255, not 8), for L0 not whole;
            an unknown norm.
    """
    check_norm(norm)
    if isinstance(eps, bool) or not isinstance(eps, Real):
        raise ValueError(f"a radius must be a number, such as 8/255, not {eps!r}")
    if norm == "l2" and not 0 <= eps < math.inf:
        raise ValueError(f"an L2 radius must be a length of at least 0 in pixels of [0, 1], not {eps}")
    if norm == "l0" and not (0 <= eps < math.inf and eps == int(eps)):
        raise ValueError(f"an L0 radius must be a whole number of pixels of at least 0, not {eps}")
    if norm == "linf" and not 0 <= eps <= 1:
        raise ValueError(f"eps must be in [0, 1] pixel units, not {eps}; for k grey levels write k/255")
    return float(eps)


def parse_radius(text: str, norm: str = "linf") -> float:
    """The radius that somebody typed: a number or a fraction.

    >>> parse_radius("8/255") == 8 / 255, parse_radius("0.5", "l2")
    (True, 0.5)

    Raises:
        ValueError: neither, or no radius of this norm; see :func:`check_eps`.
    """
    found = re.fullmatch(rf"\s*({_NUMBER})\s*(?:/\s*({_NUMBER})\s*)?", text)
    if not found or (found[2] is not None and float(found[2]) == 0):
        raise ValueError(f"{text!r} is no radius; for k grey levels write k/255, such as 8/255, or write 0.0314")
    if norm == "l2" and found[2] is not None and float(found[2]) == 255:
        told = f"{text} is what one pixel may change; in L2 a radius is the length of the whole change, such as 0.5"
        warnings.warn(told, stacklevel=2)
    return check_eps(float(found[1]) / float(found[2] or 1), norm)


def grey_levels(radii: Iterable[float]) -> list[float]:
    """L-infinity radii in grey levels of 255, for the axes of figures."""
    return [255 * eps for eps in radii]


def radius_label(eps: float, norm: str = "linf") -> str:
    """A radius for tables and figures.

    >>> radius_label(2 / 255), radius_label(0.005), radius_label(0.5, "l2"), radius_label(4, "l0")
    ('2/255', '0.005', 'L2 0.5', '4 pixels')
    """
    if check_norm(norm) == "l2":
        return f"L2 {eps:.3g}"
    if norm == "l0":
        return f"{eps:.0f} pixel{'s' * (eps != 1)}"
    levels = 255 * eps
    # as it was typed: thousandths of the pixel range are no handy number of grey levels
    return f"{levels:.4g}/255" if math.isclose(levels, round(4 * levels) / 4, abs_tol=1e-9) else f"{eps:.3g}"


def warn_if_negligible(radii: Sequence[float], norm: str = "linf") -> None:
    """Warn of radii above 0 that cannot change an answer; usually a unit was mistaken."""
    small = [eps for eps in radii if 0 < eps < NEGLIGIBLE[norm]]
    if small:
        shown = ", ".join(f"{eps:.2g}" for eps in small)
        unit = f" ({255 * max(small):.2g} grey levels of 255)" if norm == "linf" else ""
        warnings.warn(
            f"radius {shown}{unit} is too small to change an answer: radii are in [0, 1] pixel units, such as 8/255",
            stacklevel=2,
        )
