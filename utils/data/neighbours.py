"""Which images resemble each other, for sets whose pairs are too many to be held at once.

Correlations are of images pooled to 64 x 64. A few directions of a sample bound every correlation from above, so that
nearly all pairs are passed over without a look at their pixels and none above the bound is missed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import scipy  # loads its parts at their first use
import torch

POOLED_SIDE = 64
_ROWS_AT_ONCE, _COLUMNS_AT_ONCE = 512, 8192
_PAIRS_AT_ONCE = 8192
_SAMPLE, _DIRECTIONS = 1024, 512
#: Candidates an image beyond which pairs inside a group are left out.
_CROWDED = 100
#: Of float32 sums over 4,096 pixels.
_ROUNDING = 1e-5


def pooled_features(pixels: np.ndarray) -> np.ndarray:
    """Images as unit vectors, so that a dot product is a correlation.

    Args:
        pixels: uint8 array N x H x W.

    Returns:
        float32 array N x 4096: mean-pooled to 64 x 64, mean removed, Euclidean norm 1 (an image of
        one grey value becomes zeros).
    """
    features = np.empty((len(pixels), POOLED_SIDE**2), dtype=np.float32)
    for start in range(0, len(pixels), _ROWS_AT_ONCE):
        chunk = torch.from_numpy(pixels[start : start + _ROWS_AT_ONCE]).float()
        pooled = torch.nn.functional.adaptive_avg_pool2d(chunk, POOLED_SIDE).flatten(1)
        pooled -= pooled.mean(1, keepdim=True)
        features[start : start + len(chunk)] = torch.nn.functional.normalize(pooled).numpy()
    return features


def mirrored_features(pixels: np.ndarray) -> np.ndarray:
    """:func:`pooled_features` of the images flipped left to right."""
    return pooled_features(np.ascontiguousarray(pixels[:, :, ::-1]))


@dataclass(frozen=True)
class Directions:
    """An orthonormal basis in which images are told apart at a glance.

    Attributes:
        basis: D x 4096, the principal directions of a sample of pooled images.
    """

    basis: np.ndarray

    @classmethod
    def of(cls, pixels: np.ndarray, *, count: int = _DIRECTIONS) -> Directions:
        """Those of a fixed sample of uint8 images N x H x W; fewer than ``count`` where the sample has fewer."""
        chosen = np.sort(np.random.default_rng(0).permutation(len(pixels))[:_SAMPLE])
        sample = pooled_features(pixels[chosen]).astype(np.float64)
        values, vectors = np.linalg.eigh(sample @ sample.T)
        strong = np.argsort(values)[::-1][:count]
        strong = strong[values[strong] > 1e-6 * max(values.max(initial=0.0), 1e-12)]
        basis = (vectors[:, strong] / np.sqrt(values[strong])).T @ sample
        return cls(basis.astype(np.float32))

    def coordinates(self, pixels: np.ndarray, *, mirrored: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates N x D of images, and the length N of what the basis leaves out of each."""
        places = np.empty((len(pixels), len(self.basis)), dtype=np.float32)
        rest = np.empty(len(pixels), dtype=np.float32)
        for start in range(0, len(pixels), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            features = (mirrored_features if mirrored else pooled_features)(pixels[part])
            places[part] = features @ self.basis.T
            rest[part] = np.sqrt(((features**2).sum(1) - (places[part] ** 2).sum(1)).clip(0))
        return places, rest


@dataclass(frozen=True)
class Pairs:
    """Pairs of images and how far they resemble each other, or the mirror image of the other.

    Attributes:
        rows, columns: int arrays E, with rows < columns.
        correlation: float32 array E.
    """

    rows: np.ndarray
    columns: np.ndarray
    correlation: np.ndarray

    def above(self, threshold: float) -> Pairs:
        """Those with a correlation above ``threshold``."""
        keep = self.correlation > threshold
        return Pairs(self.rows[keep], self.columns[keep], self.correlation[keep])


def similar_pairs(pixels: np.ndarray, threshold: float, directions: Directions | None = None) -> Pairs:
    """All pairs that correlate above ``threshold``, of the images themselves or of one and the mirrored other.

    Memory grows with the images and not with their pairs: where a block of images has very many, those within a group
    that is connected already are left out.

    Args:
        pixels: uint8 array N x H x W.
        threshold: 0..1.
    """
    directions = directions or Directions.of(pixels)
    plain = directions.coordinates(pixels)
    flipped = directions.coordinates(pixels, mirrored=True)
    groups = np.arange(len(pixels))
    found: list[Pairs] = []
    for start in range(0, len(pixels), _ROWS_AT_ONCE):
        rows, columns = _candidates(start, plain, flipped, threshold)
        if len(rows) > _CROWDED * _ROWS_AT_ONCE:
            apart = groups[rows] != groups[columns]
            rows, columns = rows[apart], columns[apart]
        block = Pairs(rows, columns, _correlations(pixels, rows, columns)).above(threshold)
        found.append(block)
        groups = components(block, len(pixels), groups)
    return Pairs(
        *(np.concatenate([getattr(one, name) for one in found]) for name in ("rows", "columns", "correlation"))
    )


def _candidates(
    start: int, plain: tuple[np.ndarray, np.ndarray], flipped: tuple[np.ndarray, np.ndarray], threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of one block of rows with all later images whose correlation may exceed ``threshold``."""
    places, rest = plain[0][start : start + _ROWS_AT_ONCE], plain[1][start : start + _ROWS_AT_ONCE]
    may = np.zeros((len(places), len(plain[0]) - start), dtype=bool)
    for (others, left), begin in product((plain, flipped), range(start, len(plain[0]), _COLUMNS_AT_ONCE)):
        part = slice(begin, begin + _COLUMNS_AT_ONCE)
        # what two images share beyond the basis is at most the product of what it leaves out of each
        bound = places @ others[part].T + rest[:, None] * left[None, part]
        may[:, begin - start : begin - start + _COLUMNS_AT_ONCE] |= bound > threshold - _ROUNDING
    rows, columns = np.nonzero(np.triu(may, k=1))
    return rows + start, columns + start


def _correlations(pixels: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Exact correlation of each pair, the higher one of both orientations."""
    values = np.empty(len(rows), dtype=np.float32)
    for start in range(0, len(rows), _PAIRS_AT_ONCE):
        part = slice(start, start + _PAIRS_AT_ONCE)
        used, place = np.unique(np.concatenate([rows[part], columns[part]]), return_inverse=True)
        features, mirrored = pooled_features(pixels[used]), mirrored_features(pixels[used])
        left, right = np.split(place, 2)
        values[part] = np.maximum(
            np.einsum("nd,nd->n", features[left], features[right]),
            np.einsum("nd,nd->n", features[left], mirrored[right]),
        )
    return values


def components(pairs: Pairs, n: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Connected components of ``n`` images, numbered by their first image; ``groups`` are connected already."""
    rows, columns = pairs.rows, pairs.columns
    if groups is not None:
        rows, columns = np.concatenate([rows, np.arange(n)]), np.concatenate([columns, _firsts(groups)])
    edges = (np.ones(len(rows), dtype=bool), (rows, columns))
    graph = scipy.sparse.coo_matrix(edges, shape=(n, n))
    return scipy.sparse.csgraph.connected_components(graph, directed=False)[1]


def _firsts(groups: np.ndarray) -> np.ndarray:
    """The first image of each image's group."""
    _, first, place = np.unique(groups, return_index=True, return_inverse=True)
    return first[place]


def weakest_links(pairs: Pairs, groups: np.ndarray) -> np.ndarray:
    """The weakest link that holds each group together; NaN for a single image. Shape: number of groups."""
    inside = groups[pairs.rows] == groups[pairs.columns]
    # the most similar pairs that connect a group are its minimum spanning tree by distance, which must not be zero
    distance = np.maximum(1 - pairs.correlation[inside].astype(np.float64), 1e-9)
    shape = (len(groups),) * 2
    graph = scipy.sparse.coo_matrix((distance, (pairs.rows[inside], pairs.columns[inside])), shape=shape)
    tree = scipy.sparse.csgraph.minimum_spanning_tree(graph.tocsr()).tocoo()
    weakest = np.full(groups.max(initial=-1) + 1, np.nan)
    np.fmin.at(weakest, groups[tree.row], 1 - tree.data)
    return weakest
