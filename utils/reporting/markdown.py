"""What all tables of the pages share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from utils.data.sets import protocol_name


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def data_and_protocol(records: Sequence[Mapping[str, Any]]) -> str:
    """Name and split of the data that records are of."""
    data = records[0]["data"]
    return f"{data['source']}, {protocol_name(data)}"
