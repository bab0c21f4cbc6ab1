"""Finished batches of an evaluation on disk, so that a killed one goes on where it stopped.

A folder's name is a digest of everything that the numbers depend on: weights and structure of the models,
attacks, radii, images, labels, seed. A changed setting reads another folder and never a stale one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from utils.data import ImageSet
from utils.paths import atomic_write, write_json

#: Raised whenever what is stored, or how an attack works, changes.
PROTOCOL = 4


def describe_module(model: nn.Module) -> str:
    """Digest of a model: its weights, and each module's type and plain settings (its ``image_size``, for instance)."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, (int, float, str, tuple))}
        plain.pop("training", None)
        digest.update(f"{name}{type(module).__module__}{type(module).__qualname__}{sorted(plain.items())}".encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def describe_images(images: ImageSet) -> str:
    """Digest of pixels, labels and patients."""
    digest = hashlib.sha256(repr(images.classes).encode())
    for tensor in (images.images, images.labels, images.subjects):
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()[:16]


class AttackCache:
    """One evaluation's batches: ``<folder>/<key>/<name>.safetensors``.

    Args:
        folder: holds many evaluations; None keeps nothing.
        settings: plain values that the numbers depend on.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        text = json.dumps({"protocol": PROTOCOL, "torch": torch.__version__, **settings}, sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:20]
        self.folder = None if folder is None else Path(folder) / self.key
        if self.folder is not None and not (self.folder / "key.json").is_file():
            write_json(self.folder / "key.json", json.loads(text))

    def load(self, name: str) -> dict[str, torch.Tensor] | None:
        """What :meth:`save` wrote, or None.

        Raises:
            ValueError: the file is damaged; the message names it.
        """
        if self.folder is None or not self._path(name).is_file():
            return None
        try:
            return load_file(self._path(name))
        except Exception as error:
            raise ValueError(f"{self._path(name)} is damaged ({error}); delete it and run this again") from error

    def save(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one batch, whole or not at all."""
        if self.folder is not None:
            plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            atomic_write(self._path(name), lambda path: save_file(plain, path))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def cache_for(
    folder: Path | None,
    *,
    model: nn.Module,
    surrogates: Mapping[str, nn.Module],
    images: ImageSet,
    attacks: Sequence[Mapping[str, Any]],
    **settings: Any,
) -> AttackCache:
    """The cache of one evaluation. Without ``folder`` nothing is hashed and nothing kept."""
    if folder is None:
        return AttackCache(None, {})
    models = {name: describe_module(one) for name, one in {"": model, **surrogates}.items()}
    return AttackCache(folder, {"models": models, "images": describe_images(images), "attacks": attacks, **settings})
