"""What all tables of the pages share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from utils.data.sets import DataFacts


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


class _OfData(Protocol):
    @property
    def data(self) -> DataFacts | None: ...


def data_and_protocol(records: Sequence[_OfData]) -> str:
    """Name and split of the data that records are of."""
    data = records[0].data
    return f"{data.source}, {data.split_name}" if data else "unknown data"
