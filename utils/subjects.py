"""Which slices belong to the same patient, found from the pixels alone.

Neighbouring slices of one head resemble each other far more than any two heads do. Linking images
whose correlation exceeds a threshold therefore leaves one connected component a patient. File
numbers of the public data sets say nothing reliable about patients and are not used.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import scipy  # loads its parts at their first use
import torch

#: Correlation above which two images are linked. On the real sets the weakest chain inside a
#: patient holds at 0.985 and the strongest link between two patients is 0.966.
LINK_THRESHOLD = 0.975
UNKNOWN = -1

_POOLED_SIDE = 64
_CORNER = 12 / 128
_ROWS_AT_ONCE = 1024


@dataclass
class Subjects:
    """Patients of N images.

    Attributes:
        subject: int64 array N, 0-based patient ids; ``UNKNOWN`` for synthetic images.
        slice: int64 array N, position of the slice in its patient's stack; ``UNKNOWN`` likewise.
        synthetic: bool array N, made by an augmentation and not by a scanner.
        duplicate: bool array N, pixels identical to an image earlier in path order.
        notes: warnings about groups that do not look like patients, one sentence each.
    """

    subject: np.ndarray
    slice: np.ndarray
    synthetic: np.ndarray
    duplicate: np.ndarray
    notes: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of patients."""
        return len(np.unique(self.subject[self.subject != UNKNOWN]))


def find_subjects(
    pixels: np.ndarray,
    labels: np.ndarray,
    *,
    known: np.ndarray | None = None,
    threshold: float = LINK_THRESHOLD,
) -> Subjects:
    """Group images by patient.

    Args:
        pixels: uint8 array N x H x W.
        labels: int array N; used only to warn of groups with several labels.
        known: patient ids where the source names them, ``UNKNOWN`` for images of nobody, which
            count as synthetic; pixels then only give the slice order.
        threshold: correlation above which two images are linked, 0..1.
    """
    duplicate = find_duplicates(pixels)
    if known is None:
        synthetic, notes = find_synthetic(pixels)
    else:
        synthetic, notes = known == UNKNOWN, []
    real = np.flatnonzero(~synthetic & ~duplicate)
    features = pooled_features(pixels[real])
    components = known[real] if known is not None else link(features, mirrored_features(pixels[real]), threshold)
    subject = np.full(len(pixels), UNKNOWN, dtype=np.int64)
    order = np.full(len(pixels), UNKNOWN, dtype=np.int64)
    subject[real] = np.unique(components, return_inverse=True)[1]
    order[real] = _slice_order(features, subject[real], (pixels[real] > 0).sum((1, 2)))
    _copy_to_duplicates(pixels, duplicate & ~synthetic, subject, order)
    if known is None:
        notes += _suspicions(subject[real], labels[real])
    return Subjects(subject, order, synthetic, duplicate, notes)


def find_duplicates(pixels: np.ndarray) -> np.ndarray:
    """True where an earlier image has exactly the same pixels. Shape N."""
    seen: set[bytes] = set()
    duplicate = np.zeros(len(pixels), dtype=bool)
    for index, digest in enumerate(_digests(pixels)):
        duplicate[index] = digest in seen
        seen.add(digest)
    return duplicate


def _digests(pixels: np.ndarray) -> list[bytes]:
    return [hashlib.sha256(np.ascontiguousarray(image)).digest() for image in pixels]


def find_synthetic(pixels: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Images that an augmentation moved or turned: something else than black in a corner.

    Skull-stripped slices have four black corners, and rotated or shifted copies do not. Where
    most images break the rule, the source is simply not skull-stripped: none is then flagged.

    Returns:
        bool array N, and notes.
    """
    side = max(1, round(_CORNER * min(pixels.shape[1:])))
    ends = (slice(None, side), slice(-side, None))
    flagged = np.zeros(len(pixels), dtype=bool)
    for rows in ends:
        for columns in ends:
            flagged |= pixels[:, rows, columns].any(axis=(1, 2))
    if flagged.mean() > 0.5:
        note = (
            "More than half of the images have no black corners, so synthetic images cannot be "
            "told from real ones here; all are taken as real."
        )
        return np.zeros_like(flagged), [note]
    return flagged, []


def pooled_features(pixels: np.ndarray) -> np.ndarray:
    """Images as unit vectors, so that a dot product is a correlation.

    Returns:
        float32 array N x 4096: mean-pooled to 64 x 64, mean removed, Euclidean norm 1 (an image of
        one grey value becomes zeros).
    """
    features = np.empty((len(pixels), _POOLED_SIDE**2), dtype=np.float32)
    for start in range(0, len(pixels), _ROWS_AT_ONCE):
        chunk = torch.from_numpy(pixels[start : start + _ROWS_AT_ONCE]).float()
        pooled = torch.nn.functional.adaptive_avg_pool2d(chunk, _POOLED_SIDE).flatten(1)
        pooled -= pooled.mean(1, keepdim=True)
        features[start : start + len(chunk)] = torch.nn.functional.normalize(pooled).numpy()
    return features


def mirrored_features(pixels: np.ndarray) -> np.ndarray:
    """:func:`pooled_features` of the images flipped left to right."""
    return pooled_features(np.ascontiguousarray(pixels[:, :, ::-1]))


def link(features: np.ndarray, mirrored: np.ndarray, threshold: float = LINK_THRESHOLD) -> np.ndarray:
    """Connected components of the graph that links images correlated above ``threshold``.

    An image and its mirror image are of the same patient: augmented data sets hold such copies.

    Args:
        features: unit vectors, N x D, of :func:`pooled_features`.
        mirrored: those of :func:`mirrored_features`.

    Returns:
        int array N of component ids, numbered by their first image.
    """
    rows, columns = [], []
    for start in range(0, len(features), _ROWS_AT_ONCE):
        part = features[start : start + _ROWS_AT_ONCE]
        similar = (part @ features[start:].T > threshold) | (part @ mirrored[start:].T > threshold)
        near, far = np.nonzero(similar)
        rows.append(near + start)
        columns.append(far + start)
    edges = (np.ones(sum(map(len, rows)), dtype=bool), (np.concatenate(rows), np.concatenate(columns)))
    graph = scipy.sparse.coo_matrix(edges, shape=(len(features),) * 2)
    return scipy.sparse.csgraph.connected_components(graph, directed=False)[1]


def _slice_order(features: np.ndarray, subject: np.ndarray, area: np.ndarray) -> np.ndarray:
    """Position of each image in its subject's stack, all from the base of the brain upwards.

    The brain is larger at its base, which tells the direction of the first stack; the others are
    laid the way that agrees better with it.
    """
    order = np.empty(len(subject), dtype=np.int64)
    reference: np.ndarray | None = None
    for group in range(subject.max(initial=-1) + 1):
        members = np.flatnonzero(subject == group)
        stack = members[_seriate(features[members] @ features[members].T)]
        half = len(stack) // 2
        if reference is None:
            upside_down = area[stack[:half]].sum() < area[stack[len(stack) - half :]].sum()
        else:
            upside_down = _agreement(features[stack[::-1]], reference) > _agreement(features[stack], reference)
        stack = stack[::-1] if upside_down else stack
        reference = features[stack] if reference is None else reference
        order[stack] = np.arange(len(stack))
    return order


def _seriate(similarity: np.ndarray) -> np.ndarray:
    """Order that puts similar images side by side: the Fiedler vector (Atkins et al., 1998)."""
    if len(similarity) < 3:
        return np.arange(len(similarity))
    weights = np.exp((similarity - 1) / 0.02)
    laplacian = np.diag(weights.sum(1)) - weights
    return np.argsort(np.linalg.eigh(laplacian)[1][:, 1], kind="stable")


def _agreement(stack: np.ndarray, reference: np.ndarray) -> float:
    """Mean correlation of two stacks laid over each other from end to end."""
    positions = np.linspace(0, len(reference) - 1, len(stack)).round().astype(int)
    return float((stack * reference[positions]).sum(1).mean())


def _copy_to_duplicates(pixels: np.ndarray, duplicate: np.ndarray, subject: np.ndarray, order: np.ndarray) -> None:
    digests = _digests(pixels)
    first = {digest: index for index, digest in reversed(list(enumerate(digests)))}
    for index in np.flatnonzero(duplicate):
        original = first[digests[index]]
        subject[index], order[index] = subject[original], order[original]


def _suspicions(subject: np.ndarray, labels: np.ndarray) -> list[str]:
    sizes = np.bincount(subject)
    mixed = sum(len(np.unique(labels[subject == group])) > 1 for group in range(len(sizes)))
    usual, times = Counter(sizes.tolist()).most_common(1)[0]
    notes = []
    if mixed:
        notes.append(f"{mixed} of {len(sizes)} patient groups hold several labels.")
    if len(sizes) < 2 * len(np.unique(labels)) or sizes.max() > max(4 * np.median(sizes), 0.2 * len(subject)):
        notes.append(
            f"There are {len(sizes)} patient groups, the largest of {sizes.max()} of {len(subject)} images; the "
            "link threshold may be too low for these images."
        )
    if usual == 1 and times > 0.5 * len(sizes):
        notes.append(
            f"{times} of {len(sizes)} patient groups have a single image: either there is one slice "
            "a patient, or the link threshold is too high for these images."
        )
    return notes
