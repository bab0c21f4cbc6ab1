"""Records as types: what a JSON file of this project holds, checked when it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from utils.core.paths import read_json

P = TypeVar("P", bound="Part")


class Part(BaseModel):
    """A record, or a part of one. What a file holds beyond its type is kept and written back."""

    model_config = ConfigDict(
        extra="allow", frozen=True, strict=True, validate_by_name=True, arbitrary_types_allowed=True
    )

    def plain(self) -> dict[str, Any]:
        """As it is written: what was never set is left out."""
        return self.model_dump(by_alias=True, exclude_unset=True)


def plain(value: Any) -> Any:
    """Records, and lists and dictionaries with records in them, as plain values."""
    if isinstance(value, Part):
        return value.plain()
    if isinstance(value, dict):
        return {key: plain(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [plain(own) for own in value]
    return value


def parsed(kind: type[P], content: Any, where: str | Path, remedy: str) -> P:
    """What was read, as its type.

    Args:
        where: file, for the message.
        remedy: what to do.

    Raises:
        ValueError: a part is missing or is none; the message names file and part.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            told = f"{where} lacks {name}: it was not written whole, or by another program"
        else:
            shown = repr(first["input"])
            shown = shown if len(shown) <= 40 else shown[:37] + "..."
            wrong = first["msg"].split(" or instance of")[0]
            told = f"{where}: {name or 'its content'} is {shown}; {wrong[:1].lower()}{wrong[1:]}"
        raise ValueError(f"{told}; {remedy}") from None


def read_part(kind: type[P], path: Path, remedy: str) -> P:
    """A file as its type.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON, or see :func:`parsed`.
    """
    return parsed(kind, read_json(path), path, remedy)
