"""One way to check settings: named errors that say what was expected, before any long work."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

#: Beyond it NumPy's and torch's generators take no seed.
LARGEST_SEED = 2**32 - 1


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """``value`` if it is a whole number in range; True and 2.0 are none.

    Raises:
        ValueError: it is not; the message names the setting.
    """
    upper = math.inf if most is None else most
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= upper:
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {limits}, not {value!r}")
    return value


def number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> float:
    """``value`` if it is a finite number in range; True, NaN and text are none.

    Args:
        least, most: bounds that belong to the range.
        above, below: bounds that do not.

    Raises:
        ValueError: it is not; the message names the setting.
    """
    plain = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    fits = plain and (
        (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and (below is None or value < below)
    )
    if not fits:
        limits = ((least, "at least"), (above, "above"), (most, "at most"), (below, "below"))
        said = " and ".join(f"{word} {bound:g}" for bound, word in limits if bound is not None)
        raise ValueError(f"{name} must be a number{' ' + said if said else ''}, not {value!r}")
    return float(value)


def choice(name: str, value: Any, known: Collection[str]) -> str:
    """``value`` if it is one of the ``known`` words.

    Raises:
        ValueError: it is not; the message names the setting and the words.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    return value
