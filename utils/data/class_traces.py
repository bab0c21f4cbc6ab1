"""Does anything but the anatomy tell the classes apart: the size of the files, their bits, their format?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: A trait that gives the class of so many images away, and of so many more than the most frequent class, is said.
_TOLD, _MORE = 0.9, 0.1


@dataclass(frozen=True)
class Traits:
    """How an image was saved, in words: its size, its bits, its format."""

    size: str
    bits: str
    format: str


def traces(images: Sequence[Traits], labels: np.ndarray, classes: Sequence[str]) -> list[str]:
    """What a classifier could learn instead of the anatomy, one sentence for each trait that tells the classes.

    Args:
        images: N.
        labels: N, indices into ``classes``.
    """
    usual = np.bincount(labels).max() / len(labels)
    notes = []
    for trait, word in (("size", "size"), ("bits", "bit depth"), ("format", "format")):
        pairs = Counter((getattr(image, trait), classes[label]) for image, label in zip(images, labels))
        best: dict[str, tuple[int, str]] = {}
        for (value, name), count in pairs.items():
            best[value] = max(best.get(value, (0, "")), (count, name))
        told = sum(count for count, _ in best.values()) / len(labels)
        if len(best) > 1 and told >= max(_TOLD, usual + _MORE):
            shown = "; ".join(f"{value}: {name}" for value, (_, name) in sorted(best.items())[:4])
            notes.append(
                f"The {word} of the files gives the class of {told:.0%} of the images away ({shown}): a classifier "
                "may learn that instead of the anatomy."
            )
    return notes
