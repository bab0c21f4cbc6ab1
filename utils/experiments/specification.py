"""Whether what lies there was made with the same settings as are asked for now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.core.paths import file_digest
from utils.data.sets import DataSplits


def start_facts(weights: str | Path) -> dict[str, str]:
    """Name and SHA-256 of the weights that a training begins with; a word such as ``scratch`` has no digest.

    Args:
        weights: ``scratch``, ``pretrained``, a file, or the folder of a checkpoint.

    Raises:
        FileNotFoundError: no such file.
    """
    path = Path(weights)
    if str(weights) in ("scratch", "pretrained"):
        return {"weights": str(weights), "weights_sha256": ""}
    file = path / "weights.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"weights file {file} does not exist; use a path, 'pretrained' or 'scratch'")
    return {"weights": path.name, "weights_sha256": file_digest(file)}


def differing(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What of ``wanted`` is otherwise in ``stored``, in words; what ``stored`` does not tell is left out.

    >>> differing({"epochs": 8, "seed": 0}, {"epochs": 2, "seed": 0, "size": 32})
    ['epochs (8, not 2)']
    """
    found = []
    for name, value in wanted.items():
        value, own = _plain(value), _plain(stored.get(name))
        if name not in stored or own == value:
            continue
        if isinstance(own, dict) and isinstance(value, dict):
            # a setting that only one of them has is different, too
            every = dict.fromkeys([*own, *value])
            found += differing({key: own.get(key) for key in every}, {key: value.get(key) for key in every})
        else:
            found.append(f"{name} ({_short(own)}, not {_short(value)})")
    return found


def refuse_other(where: str | Path, stored: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str) -> None:
    """Refuse to go on from what was made with other settings.

    Raises:
        ValueError: some of ``wanted`` is otherwise in ``stored``; the message names it with both values.
    """
    other = differing(stored, wanted)
    if other:
        raise ValueError(f"{where} was made with other {', '.join(other)}; {remedy}")


def _plain(value: Any) -> Any:
    """As it is read from JSON again."""
    return json.loads(json.dumps(value))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def images_fingerprint(splits: DataSplits) -> str:
    """SHA-256 over classes and all images, labels and patients, on whatever sides; 16 hexadecimal digits."""
    everyone = splits.everyone
    order = sorted(range(len(everyone)), key=everyone.paths.__getitem__)
    digest = hashlib.sha256(repr((everyone.classes, tuple(everyone.images.shape))).encode())
    for place in order:
        digest.update(f"{everyone.paths[place]}{everyone.labels[place]}{everyone.subjects[place]}".encode())
        digest.update(everyone.images[place].contiguous().numpy().data)
    return digest.hexdigest()[:16]
