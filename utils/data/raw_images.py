"""Decoded images of a source with all that it tells of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

#: What names patients that were made with their images; nobody has to ask about them.
SOURCE = "the source"


@dataclass
class RawImages:
    """Decoded images in path order.

    Attributes:
        pixels: uint8 array N x H x W, grey, 0..255.
        labels: int64 array N, indices into ``classes``.
        paths: N paths relative to the source, with forward slashes.
        classes: class names in label order.
        folders: N entries, ``"train"``, ``"validation"``, ``"test"`` or ``""`` where the source has no such folders.
        name: short name of the source.
        subjects: int64 array N where the source itself names the patients, else None.
        subjects_from: what names them, in words; pixels are asked about all but ``SOURCE``.
        subjects_guessed: whether nothing names them, and each scan was taken for a person of its own.
        notes: what a reader should know about the decoding, one sentence each.
        info: plain values that go into every record made from these images. Of what was noticed
            while reading, only what occurs: ``intensity`` of 16-bit images (``bits``, ``images``,
            ``low``, ``high``), and the counts ``colour_images``, ``transparent_images``,
            ``turned_images``, ``multi_frame_images``, ``conflicting_images``, ``ignored_files``.
    """

    pixels: np.ndarray
    labels: np.ndarray
    paths: list[str]
    classes: tuple[str, ...]
    folders: list[str]
    name: str
    subjects: np.ndarray | None = None
    subjects_from: str = SOURCE
    subjects_guessed: bool = False
    notes: list[str] = field(default_factory=list)
    info: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)
