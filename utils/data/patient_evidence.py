"""May groups that were found from pixels pass for patients? They must earn it, by more than their own threshold.

Three questions that the grouping itself does not answer. Are the groups of sizes that patients have? Is there a gap
between the weakest link inside and the strongest between? Do outside witnesses agree: does no group find its own head
again in another one that is merely shifted, turned, enlarged or mirrored, and does a nearest neighbour know no more of
other groups' classes than the classes alone give away?
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from utils.data.neighbours import POOLED_SIDE, Directions, Pairs, pooled_features, weakest_links

#: Between the weakest link inside a group and the strongest between two, at least so much. On the real sets .984 stand
#: against .964; where every second slice is missing, links of all strengths occur and nothing is left between.
LEAST_GAP = 0.005
#: Two groups that correlate above this once one is shifted are one head. On the real sets no two of 200 people exceed
#: .960 and the same head shifted by three pixels reaches .977.
SAME_HEAD = 0.968
#: By how much a nearest neighbour may beat what the classes alone give, as a share of images.
WITNESS_SLACK = 0.15
#: Share of groups that may hold images of several classes.
MIXED_SHARE = 0.05
#: Share of images whose most similar one must be of the same group, where names suggest the groups.
CONFIRMED_SHARE = 0.9
_IMAGES_ASKED = 1000
_REACH = 4  # pixels of 64 either way
#: Degrees and factors of copies. On the real sets no two people exceed .952 under any of them, and copies turned by 7
#: to 12 degrees or enlarged by 12 % reach .974 and more.
_TURNS, _ZOOMS = (-15, -10, -5, 5, 10, 15, 180), (0.9, 1.1)
_ANCHORS, _GROUPS_ASKED, _LOOKED_AT = 2, 100, 5
_ALIGNING_DIRECTIONS = 256
_WITNESS_SIDE, _WITNESS_TEST, _WITNESS_AXES = 32, 2000, 20
#: A fifth of fewer groups than these is too few to say anything of.
_FEW_GROUPS = 100


@dataclass(frozen=True)
class Evidence:
    """What speaks for and against a grouping from pixels.

    Attributes:
        n_groups, usual_size, largest: of the groups, in images.
        inside, between: correlation of the weakest link inside a group, and of the strongest between two or a bound
            that it does not exceed; NaN where the groups were not made by links.
        shifted: groups, of ``shifted_asked``, that find their own head in another group once it is moved.
        nearest, expected: accuracy of a nearest neighbour on other groups, and what the classes alone give; NaN where
            there are too few groups to ask.
        mixed: groups with images of several classes.
        doubts: why these groups may not be patients, one sentence each; none where all checks passed.
    """

    n_groups: int
    usual_size: int
    largest: int
    inside: float
    between: float
    shifted: int
    shifted_asked: int
    nearest: float
    expected: float
    mixed: int
    doubts: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a record; None for what could not be asked."""
        plain = asdict(self) | {"doubts": list(self.doubts)}
        return {key: None if isinstance(value, float) and value != value else value for key, value in plain.items()}


def weigh(
    pixels: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    order: np.ndarray,
    pairs: Pairs | None = None,
    lowest: float = 0.0,
) -> Evidence:
    """All checks on groups that were found by links, or the outside witnesses alone on groups that names gave.

    Args:
        pixels: uint8 array N x H x W of real images without copies.
        labels: N classes.
        groups: N, 0-based.
        order: N, place of each image in its group's stack.
        pairs: of :func:`utils.data.neighbours.similar_pairs` above ``lowest``, some of them between groups; None for
            groups that names gave.
        lowest: correlation down to which ``pairs`` are known, below the threshold of the groups.
    """
    sizes = np.bincount(groups)
    inside, between = _gap(pairs, groups, lowest) if pairs else (float("nan"), float("nan"))
    mixed = sum(times > 1 for times in Counter(g for g, _ in set(zip(groups.tolist(), labels.tolist()))).values())
    shifted, asked = shifted_heads(pixels, groups, order)
    nearest, expected, n_test = witness(pixels, labels, groups)
    doubts = _witness_doubts(shifted, asked, nearest, expected, n_test)
    if pairs:
        by_size = _size_doubts(sizes, len(np.unique(labels)))
        doubts = [*by_size, *_link_doubts(inside, between, mixed, len(sizes)), *doubts]
    usual = Counter(sizes.tolist()).most_common(1)[0][0]
    return Evidence(
        n_groups=len(sizes),
        usual_size=int(usual),
        largest=int(sizes.max()),
        inside=inside,
        between=between,
        shifted=shifted,
        shifted_asked=asked,
        nearest=nearest,
        expected=expected,
        mixed=mixed,
        doubts=tuple(doubts),
    )


def _gap(pairs: Pairs, groups: np.ndarray, lowest: float) -> tuple[float, float]:
    """Correlation of the weakest link inside a group and of the strongest between two."""
    links = weakest_links(pairs, groups)
    inside = float(np.nanmin(links)) if np.isfinite(links).any() else float("nan")
    apart = groups[pairs.rows] != groups[pairs.columns]
    return inside, float(pairs.correlation[apart].max(initial=lowest))


def confirmed(pixels: np.ndarray, groups: np.ndarray) -> bool:
    """Whether pixels confirm groups that names only suggest: nearly each image resembles one of its own group most.

    Asks for a fixed part of the images.
    """
    sizes = np.bincount(groups)
    if len(sizes) < 4 or np.median(sizes) < 2 or sizes.max() > 0.5 * len(groups):
        return False
    asked = np.random.default_rng(0).permutation(len(pixels))[:_IMAGES_ASKED]
    features, best = pooled_features(pixels[asked]), np.full(len(asked), -np.inf, dtype=np.float32)
    nearest = np.zeros(len(asked), dtype=np.int64)
    for start in range(0, len(pixels), _IMAGES_ASKED):
        found = features @ pooled_features(pixels[start : start + _IMAGES_ASKED]).T
        found[asked[:, None] == np.arange(start, start + found.shape[1])] = -np.inf
        better = found.max(1) > best
        nearest[better], best[better] = start + found.argmax(1)[better], found.max(1)[better]
    return float((groups[nearest] == groups[asked]).mean()) >= CONFIRMED_SHARE


def _size_doubts(sizes: np.ndarray, n_classes: int) -> list[str]:
    single = int((sizes == 1).sum())
    doubts = []
    if single > 0.5 * len(sizes):
        doubts.append(
            f"{single} of {len(sizes)} groups have a single image: either there is one slice a patient, or slices of "
            "one patient were not recognised"
        )
    elif sizes.min() < 0.25 * np.median(sizes):
        fragments = int((sizes < 0.25 * np.median(sizes)).sum())
        doubts.append(
            f"{fragments} of {len(sizes)} groups have less than a quarter of the usual {np.median(sizes):.0f} images: "
            "fragments of other patients, perhaps"
        )
    if len(sizes) < 2 * n_classes or sizes.max() > max(4 * np.median(sizes), 0.2 * sizes.sum()):
        doubts.append(
            f"there are {len(sizes)} groups, the largest of {sizes.max()} of {sizes.sum()} images: several patients "
            "may have been taken for one"
        )
    return doubts


def _link_doubts(inside: float, between: float, mixed: int, n_groups: int) -> list[str]:
    doubts = []
    if np.isfinite(inside) and inside - between < LEAST_GAP:
        doubts.append(
            f"the weakest link inside a group ({inside:.3f}) is hardly stronger than the strongest between two "
            f"({between:.3f}): nothing tells one patient's slices from two patients'"
        )
    if mixed > MIXED_SHARE * n_groups:
        doubts.append(f"{mixed} of {n_groups} groups hold images of several classes")
    return doubts


def _witness_doubts(shifted: int, asked: int, nearest: float, expected: float, n_test: int) -> list[str]:
    doubts = []
    if shifted:
        doubts.append(
            f"{shifted} of {asked} groups find their own head in another group once it is shifted, turned, enlarged or "
            "mirrored: the same people scanned or cut twice, or copies of an augmentation"
        )
    # two standard errors, of groups and not of images, where there are few
    slack = max(WITNESS_SLACK, 2 * np.sqrt(expected * (1 - expected) / max(n_test, 1)))
    if nearest > expected + slack:
        doubts.append(
            f"a nearest neighbour that learns nothing answers {nearest:.1%} of other groups' images rightly, where the "
            f"classes alone give {expected:.1%}: it recognises people on both sides"
        )
    return doubts


def shifted_heads(pixels: np.ndarray, groups: np.ndarray, order: np.ndarray) -> tuple[int, int]:
    """How many groups find their own head in another one that was moved, and how many were asked.

    A few slices of each group, of at most ``_GROUPS_ASKED`` fixed ones, are shifted by up to ``_REACH`` pixels of 64,
    turned, mirrored, made larger and smaller, and compared with every image of other groups.
    """
    names = np.unique(groups)
    asked = np.random.default_rng(0).permutation(names)[:_GROUPS_ASKED]
    if len(names) < 2:
        return 0, 0
    directions = Directions.of(pixels, count=_ALIGNING_DIRECTIONS)
    places, _ = directions.coordinates(pixels)
    by_group = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[by_group], names)
    ends = np.append(starts[1:], len(groups))
    found = 0
    for group in asked:
        members = by_group[starts[group] : ends[group]]
        found += _finds_itself(pixels, groups, members[np.argsort(order[members])], directions.basis, places)
    return found, len(asked)


def _finds_itself(
    pixels: np.ndarray, groups: np.ndarray, stack: np.ndarray, basis: np.ndarray, places: np.ndarray
) -> bool:
    middle = np.linspace(0, len(stack) - 1, min(_ANCHORS, len(stack)) + 2).round().astype(int)[1:-1]
    anchors = np.unique(stack[middle])
    own = groups == groups[anchors[0]]
    for anchor in pooled_features(pixels[anchors]):
        moved = np.concatenate([_shifted(anchor), _turned(anchor)])
        estimate = np.where(own, -np.inf, (places @ (moved @ basis.T).T).max(1))
        likely = np.argsort(estimate)[-_LOOKED_AT:]
        likely = likely[~own[likely]]
        if (moved @ pooled_features(pixels[likely]).T).max() > SAME_HEAD:
            return True
    return False


def _shifted(feature: np.ndarray) -> np.ndarray:
    """An image of :func:`pooled_features` at all shifts in reach, S x 4096; what leaves on one side comes in again."""
    image, steps = feature.reshape(POOLED_SIDE, POOLED_SIDE), range(-_REACH, _REACH + 1)
    return np.stack([np.roll(image, (down, right), (0, 1)).ravel() for down in steps for right in steps])


def _turned(feature: np.ndarray) -> np.ndarray:
    """An image of :func:`pooled_features` as augmentations copy it, T x 4096: turned, mirrored, larger and smaller."""
    from scipy import ndimage  # slow to import

    image, middle = feature.reshape(POOLED_SIDE, POOLED_SIDE), (POOLED_SIDE - 1) / 2
    copies = [ndimage.rotate(image, angle, reshape=False, order=1, mode="nearest") for angle in _TURNS]
    copies += [image[::-1], image[:, ::-1]]
    for zoom in _ZOOMS:
        place = middle - middle / zoom
        copies.append(ndimage.affine_transform(image, [1 / zoom] * 2, offset=place, order=1, mode="nearest"))
    flat = np.stack(copies).reshape(len(copies), -1)
    flat = flat - flat.mean(1, keepdims=True)
    return (flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def witness(pixels: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> tuple[float, float, int]:
    """Accuracy of a nearest neighbour on groups that it does not know, what the classes alone give, and their number.

    A fifth of the groups is asked for, and where they are few all of them, a fifth at a time. What the classes alone
    give is the best of the most frequent class among all images, that among the groups that are known, and a linear
    discriminant on a few principal axes, which is too simple to know people again.
    """
    names = np.random.default_rng(0).permutation(np.unique(groups))
    if len(names) < 10:
        return float("nan"), float("nan"), 0
    parts = np.array_split(names, 5) if len(names) < _FEW_GROUPS else [names[: len(names) // 5]]
    small, found = _small(pixels), []
    for part in parts:
        asked = np.isin(groups, part)
        test, train = np.flatnonzero(asked), np.flatnonzero(~asked)
        if len(np.unique(labels[train])) < 2:
            return float("nan"), float("nan"), 0
        test = np.random.default_rng(0).permutation(test)[:_WITNESS_TEST]
        found.append((len(test), _nearest_is_right(small, labels, train, test), _alone(small, labels, train, test)))
    sizes, nearest, alone = np.array(found).T
    usual = float(np.bincount(np.unique(labels, return_inverse=True)[1]).max()) / len(labels)
    expected = max(float(np.average(alone, weights=sizes)), usual)
    return float(np.average(nearest, weights=sizes)), expected, sum(len(part) for part in parts)


def _nearest_is_right(small: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    known = small[train]
    lengths = np.einsum("nd,nd->n", known, known)
    parts = np.array_split(test, -(-len(test) // 256))
    nearest = np.concatenate([(lengths - 2 * small[part] @ known.T).argmin(1) for part in parts])
    return float((labels[train][nearest] == labels[test]).mean())


def classes_alone(pixels: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    """Accuracy on ``test`` of what is too simple to know people again, see :func:`witness`.

    Args:
        pixels: uint8 array N x H x W.
        labels: N classes.
        train, test: indices.
    """
    return _alone(_small(pixels), labels, train, test)


def _alone(small: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    usual = float((labels[test] == np.bincount(labels[train]).argmax()).mean())
    one_class = len(np.unique(labels[train])) < 2
    return usual if one_class else max(usual, _linear_accuracy(small, labels, train, test))


def _small(pixels: np.ndarray) -> np.ndarray:
    """Raw grey values pooled to a small side, float32 N x D in [0, 1]."""
    small = np.empty((len(pixels), _WITNESS_SIDE**2), dtype=np.float32)
    for start in range(0, len(pixels), 2048):
        part = torch.from_numpy(pixels[start : start + 2048]).float() / 255
        small[start : start + len(part)] = torch.nn.functional.adaptive_avg_pool2d(part, _WITNESS_SIDE).flatten(1)
    return small


def _linear_accuracy(small: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    from sklearn.decomposition import PCA  # slow to import, rarely needed
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.pipeline import make_pipeline

    axes = min(_WITNESS_AXES, len(train) - 1, small.shape[1])
    some = np.random.default_rng(0).permutation(train)[:20_000]
    model = make_pipeline(PCA(axes, random_state=0), LinearDiscriminantAnalysis())
    return float((model.fit(small[some], labels[some]).predict(small[test]) == labels[test]).mean())
