"""Which slices belong to the same patient: by ids where the source gives them, else from the pixels.

Neighbouring slices of one head resemble each other far more than any two heads do. Linking images
whose correlation exceeds a threshold therefore leaves one connected component a patient, where no slice is missing
between. Whether it did is weighed by :mod:`utils.data.patient_evidence`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from utils.data.neighbours import components, pooled_features, similar_pairs
from utils.data.patient_evidence import Evidence, weigh
from utils.data.raw_images import SOURCE
from utils.data.subject_ids import UNKNOWN, converted

__all__ = ["UNKNOWN", "Subjects", "find_duplicates", "find_subjects", "find_synthetic", "pooled_features"]

#: Correlation above which two images are linked. On the real sets the weakest chain inside a
#: patient holds at 0.984 and the strongest link between two patients is 0.964.
LINK_THRESHOLD = 0.975
#: Links are looked at from so far below the threshold, for a gap to show.
_LOOK_BELOW = 0.02
#: Accuracy of what is too simple to see anatomy, from which on it is said. On the real sets it is .48 to .55.
_TOLD_ALONE = 0.95
#: Where more of the patients than this share have images of several classes, their ids are hardly those of people.
_MOST = 0.5
_BEGIN_ANEW = (
    " These are so many that the ids may begin anew in each class, or at each site, and mean other people there: name "
    "people apart with --subjects FILE.csv or --subject-pattern."
)
PIXELS = "pixels"

#: An image is synthetic if so much of its four corners, squares of 12 of 128 pixels, is not black. In the set that
#: this rule is made for, turned and shifted copies light up at least 1.2 % of them and real slices nothing.
CORNER_SHARE = 0.01
_CORNER = 12 / 128
#: Longer stacks than any scan has are laid along their first principal axis, since seriation is cubic.
_LONGEST_STACK = 512


@dataclass
class Subjects:
    """Patients of N images.

    Attributes:
        subject: int64 array N, 0-based patient ids; ``UNKNOWN`` for images of nobody.
        slice: int64 array N, position of the slice in its patient's stack; ``UNKNOWN`` likewise.
        synthetic: bool array N, made by an augmentation and not by a scanner.
        duplicate: bool array N, pixels identical to an image earlier in path order.
        origin: where the ids come from, in words.
        guessed: from pixels, or from names that only suggest patients.
        evidence: what pixels say of them; None where the images were made with their patients.
        notes: what a reader should know, one sentence each.
    """

    subject: np.ndarray
    slice: np.ndarray
    synthetic: np.ndarray
    duplicate: np.ndarray
    origin: str = PIXELS
    guessed: bool = True
    evidence: Evidence | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of patients."""
        return len(np.unique(self.subject[self.subject != UNKNOWN]))

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why these may not be patients; nothing where they are named, or where the guess passed all checks."""
        return self.evidence.doubts if self.evidence and self.guessed else ()

    def facts(self) -> dict:
        """Plain values for the record of everything that is made of these patients."""
        # doubts about named patients stop no split, but go wherever its results go
        doubts = list(self.evidence.doubts) if self.evidence else []
        plain = {"from": self.origin, "count": self.count, "verified": not doubts, "doubts": doubts}
        return plain | ({"evidence": self.evidence.as_dict()} if self.evidence else {})


def find_subjects(
    pixels: np.ndarray,
    labels: np.ndarray,
    *,
    known: np.ndarray | None = None,
    origin: str = SOURCE,
    guessed: bool = False,
    synthetic: np.ndarray | None = None,
    threshold: float = LINK_THRESHOLD,
) -> Subjects:
    """Group images by patient.

    Args:
        pixels: uint8 array N x H x W.
        labels: int array N; groups are never made by them, but they bear witness of a guess.
        known: patient ids where the source names them, ``UNKNOWN`` for images of nobody; pixels then only give the
            slice order.
        origin: where ``known`` stands, in words; pixels are asked what they say of all ids but those of ``SOURCE``.
        guessed: ``known`` is only suggested by names.
        synthetic: bool array N of :func:`find_synthetic`; None takes all images as real.
        threshold: correlation above which two images are linked, 0..1.
    """
    duplicate = find_duplicates(pixels)
    synthetic = np.zeros(len(pixels), dtype=bool) if synthetic is None else synthetic
    real = np.flatnonzero(~synthetic & ~duplicate)
    subject = np.full(len(pixels), UNKNOWN, dtype=np.int64)
    order = np.full(len(pixels), UNKNOWN, dtype=np.int64)
    pairs, lowest = None, max(0.0, threshold - _LOOK_BELOW)
    if known is None:
        pairs = similar_pairs(pixels[real], lowest)
        subject[real] = components(pairs.above(threshold), len(real))
    else:
        subject[real] = known[real]
        real = real[known[real] != UNKNOWN]
        subject[real] = np.unique(subject[real], return_inverse=True)[1]
    order[real] = _slice_order(pixels, real, subject[real])
    evidence = None
    if len(real) and (known is None or origin != SOURCE):
        evidence = weigh(pixels[real], labels[real], subject[real], order[real], pairs, lowest)
    _copy_to_duplicates(pixels, duplicate & ~synthetic, subject, order)
    origin = PIXELS if known is None else origin
    found = Subjects(subject, order, synthetic, duplicate, origin, guessed or known is None, evidence)
    found.notes += _notes(found, labels)
    return found


def _notes(found: Subjects, labels: np.ndarray) -> list[str]:
    says = "Patients unverified" if found.guessed else f"Pixels disagree with {found.origin}"
    notes = [f"{says}: {doubt}." for doubt in (found.evidence.doubts if found.evidence else ())]
    if found.evidence and found.evidence.expected >= _TOLD_ALONE:
        notes.append(
            f"A linear rule on a few principal components tells the classes of {found.evidence.expected:.0%} of the "
            "images of other patients: do the classes differ in how their images were made (negative, turned, another "
            "machine)?"
        )
    real = (found.subject != UNKNOWN) & ~found.synthetic
    changed = converted(found.subject[real], labels[real])
    if changed and not found.guessed:
        notes.append(
            f"{changed} of {found.count} patients have images of several classes (a diagnosis that changed between "
            "visits, or a wrong id); each is on one side and counts for its most frequent class."
            + (_BEGIN_ANEW if changed > _MOST * found.count and found.count > 1 else "")
        )
    sizes = np.bincount(found.subject[real])
    single = int((sizes == 1).sum())
    if not found.guessed and single > 0.5 * found.count and found.count > 1:
        notes.append(
            f"{single} of {found.count} patients have a single image each: is what names them the patient, and not the "
            "image?"
        )
    longest = int(sizes.max(initial=0))
    if longest > _LONGEST_STACK:
        notes.append(f"A patient has {longest} images, more than a scan; their slice order is a rough one.")
    return notes


def find_duplicates(pixels: np.ndarray) -> np.ndarray:
    """True where an earlier image has exactly the same pixels. Shape N."""
    seen: set[bytes] = set()
    duplicate = np.zeros(len(pixels), dtype=bool)
    for index, digest in enumerate(_digests(pixels)):
        duplicate[index] = digest in seen
        seen.add(digest)
    return duplicate


def _digests(pixels: np.ndarray) -> list[bytes]:
    return [hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in pixels]


def find_synthetic(pixels: np.ndarray, *, share: float = CORNER_SHARE) -> tuple[np.ndarray, list[str]]:
    """Images that an augmentation moved or turned, by the rule of the Best Alzheimer's MRI set.

    Its skull-stripped slices have four black corners, and rotated or shifted copies do not. Where
    most images break the rule it does not belong to this source: none is then flagged.

    Args:
        pixels: uint8 array N x H x W.
        share: of the corners' pixels that must be lit.

    Returns:
        bool array N, and notes.
    """
    side = max(1, round(_CORNER * min(pixels.shape[1:])))
    ends = (slice(None, side), slice(-side, None))
    lit = sum((pixels[:, rows, columns] > 0).sum((1, 2)) for rows in ends for columns in ends)
    flagged = lit >= share * 4 * side**2
    if flagged.mean() > 0.5:
        note = (
            "More than half of the images have no black corners, so synthetic images cannot be "
            "told from real ones here; all are taken as real."
        )
        return np.zeros_like(flagged), [note]
    return flagged, []


def _slice_order(pixels: np.ndarray, chosen: np.ndarray, subject: np.ndarray) -> np.ndarray:
    """Position of each chosen image in its subject's stack, all from the base of the brain upwards.

    The brain is larger at its base, which tells the direction of the first stack; the others are
    laid the way that agrees better with it.
    """
    order = np.empty(len(subject), dtype=np.int64)
    reference: np.ndarray | None = None
    by_subject = np.argsort(subject, kind="stable")
    for members in np.split(by_subject, np.flatnonzero(np.diff(subject[by_subject])) + 1):
        features = pooled_features(pixels[chosen[members]])
        along = _seriate(features)
        stack, half = features[along], len(along) // 2
        if reference is None:
            area = (pixels[chosen[members[along]]] > 0).sum((1, 2))
            upside_down = area[:half].sum() < area[len(along) - half :].sum()
        else:
            upside_down = _agreement(stack[::-1], reference) > _agreement(stack, reference)
        along = along[::-1] if upside_down else along
        reference = features[along] if reference is None else reference
        order[members[along]] = np.arange(len(along))
    return order


def _seriate(features: np.ndarray) -> np.ndarray:
    """Order that puts similar images side by side: the Fiedler vector (Atkins et al., 1998)."""
    if len(features) < 3:
        return np.arange(len(features))
    if len(features) > _LONGEST_STACK:
        centred = features - features.mean(0)
        return np.argsort(centred @ (centred.T @ (centred @ centred[0])), kind="stable")
    similarity = features @ features.T
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
