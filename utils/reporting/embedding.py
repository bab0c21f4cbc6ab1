"""All slices of some patients, placed by how alike their pixels are: the leak of a split by image, seen at a glance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from utils.core.parts import Part, read_part
from utils.core.paths import write_json
from utils.core.reproducibility import environment_facts
from utils.data.sets import ImageSet, patients_verified
from utils.data.subject_ids import UNKNOWN
from utils.evaluation.leak_audit import raw_pixels
from utils.reporting.style import COLOURS, axes_of, finish, save_figure

EMBEDDING = "embedding.json"
#: More slices make no clearer picture, and take long.
_MOST = 2000
#: Principal components that t-SNE sees, and its perplexity: a patient has 32 slices in the public sets.
_COMPONENTS, _PERPLEXITY = 50, 30


class Embedding(Part):
    """Where each slice lies.

    Attributes:
        places: x and y of each slice.
        labels, subjects, slices: class, patient and place in the patient's stack of each.
        method: how the places were found.
        same_patient: share of slices of known patients whose nearest slice is of the same one; None where nobody is
            known, or where patients were found in these pixels and failed their checks.
    """

    places: list[list[float]]
    labels: list[int]
    subjects: list[int]
    slices: list[int]
    classes: list[str]
    method: str
    same_patient: float | None
    note: str
    environment: dict[str, Any]


def embed(images: ImageSet, *, seed: int = 0, note: str = "") -> Embedding:
    """t-SNE (van der Maaten and Hinton, 2008) of raw pixels, without any model or label.

    Args:
        images: of more than ``_MOST`` some whole patients are taken.
        seed: of the placing.
        note: what must be said of the data.

    Raises:
        ValueError: fewer than three images.
    """
    if len(images) < 3:
        raise ValueError(f"{len(images)} images cannot be placed by how alike they are; give at least three")
    from sklearn.decomposition import PCA  # slow to import
    from sklearn.manifold import TSNE
    from sklearn.neighbors import NearestNeighbors
    from threadpoolctl import threadpool_limits

    images = _few_patients(images, seed)
    components = min(_COMPONENTS, len(images) - 1)
    perplexity = min(_PERPLEXITY, (len(images) - 1) / 3)
    pixels = raw_pixels(images).astype(np.float32)
    # a thousand short steps, whose threads would wait for each other: beside other work they take six times as long
    with threadpool_limits(1):
        pixels = PCA(components, random_state=seed).fit_transform(pixels)
        nearest = NearestNeighbors(n_neighbors=1).fit(pixels).kneighbors(return_distance=False)[:, 0]
        places = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(pixels)
    return Embedding(
        places=places.astype(float).round(2).tolist(),
        labels=images.labels.tolist(),
        subjects=images.subjects.tolist(),
        slices=images.slices.tolist(),
        classes=list(images.classes),
        method=f"t-SNE, perplexity {perplexity:g}, of {components} principal components of raw pixels",
        same_patient=_same_patient(images, nearest),
        note=note,
        environment=environment_facts(),
    )


def _few_patients(images: ImageSet, seed: int) -> ImageSet:
    """All slices of as many patients, drawn by ``seed``, as have ``_MOST`` together, and of one at least."""
    patients, counts = images.subjects[images.subjects != UNKNOWN].unique(return_counts=True)
    if len(images) <= _MOST or len(patients) == 0:
        return images.balanced_subset(_MOST, seed)
    order = torch.randperm(len(patients), generator=torch.Generator().manual_seed(seed))
    fitting = max(1, int((counts[order].cumsum(0) <= _MOST).sum()))
    chosen = torch.isin(images.subjects, patients[order[:fitting]])
    return images.subset(torch.nonzero(chosen)[:, 0])


def _same_patient(images: ImageSet, nearest: np.ndarray) -> float | None:
    subjects = images.subjects.numpy()
    known = subjects != UNKNOWN
    if not known.any() or not patients_verified(images.info):
        return None
    return float((subjects[nearest] == subjects)[known].mean())


def embedding_figure(found: Embedding) -> Figure:
    """Left the classes, right the patients, each of whose slices one line joins in their order."""
    places, labels, subjects = np.array(found.places), np.array(found.labels), np.array(found.subjects)
    patients = np.unique(subjects[subjects != UNKNOWN])
    figure, (axes,) = axes_of(1, 2, size=(9.6, 5.2))
    for number, name in enumerate(found.classes):
        own = places[labels == number]
        style = {"color": COLOURS[number % len(COLOURS)], "marker": "o^sD"[number % 4]}
        axes[0].scatter(*own.T, s=9, label=name, linewidths=0, **style)
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=4, fontsize=9)
    for number, patient in enumerate(patients):
        own = np.flatnonzero(subjects == patient)
        ordered = own[np.argsort(np.array(found.slices)[own], kind="stable")]
        axes[1].plot(*places[ordered].T, "-o", color=COLOURS[number % len(COLOURS)], markersize=2, linewidth=0.9)
    for ax, title in zip(axes, ("by class", f"by patient: a line joins the slices of each of {len(patients)}")):
        ax.set(title=title, xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    message = "Slices placed by how alike they look"
    if found.same_patient is not None:
        message = f"The slice that looks most alike is of the same person for {found.same_patient:.1%} of the slices"
    return finish(figure, message, f"{len(places)} slices; {found.method}", found.note)


def save_embedding(images: ImageSet, folder: Path, *, note: str = "") -> Figure | None:
    """Write ``embedding.json`` and ``embedding.png`` into ``folder``, and return the figure.

    Fewer than three images are not placed, and give None.
    """
    if len(images) < 3:
        return None
    found = embed(images, note=note)
    write_json(folder / EMBEDDING, found.plain())
    figure = embedding_figure(found)
    save_figure(figure, (folder / EMBEDDING).with_suffix(".png"))
    return figure


def redraw_embedding(record: Path) -> Path:
    """Draw the figure of a stored :class:`Embedding` beside it, and return its path."""
    found = read_part(Embedding, record, "it is made by python -m utils prepare with --audit")
    return save_figure(embedding_figure(found), record.with_suffix(".png"))
