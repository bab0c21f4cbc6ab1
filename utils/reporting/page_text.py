"""Where tables stand in the text of a page.

A table stands between ``<!-- table KIND RECORD -->`` and ``<!-- end -->``; a ``*`` in RECORD makes one of several.
"""

from __future__ import annotations

import re
from pathlib import Path

from utils.core.paths import ROOT

#: A table with its markers: the first marker, KIND, RECORD, what stands between, and the second marker.
BLOCK = re.compile(r"(<!-- table (\w+) (\S[^\n]*?) -->\n)(.*?)(<!-- end -->)", re.S)
_BEGIN = re.compile(r"<!-- table (\w+) (\S[^\n]*?) -->")


def read_page(path: Path) -> str:
    """The text of a page.

    Raises:
        FileNotFoundError, ValueError: it is not there, or is no text; the message names it.
    """
    remedy = f"get it back with `git checkout {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}`"
    if not path.is_file():
        raise FileNotFoundError(f"there is no page {path}; {remedy}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}); {remedy}") from error


def check_markers(text: str, page: str) -> None:
    """See that each table has a beginning that can be read, and its end before the next one begins.

    Without that a table would be left as it is, or the text behind it taken for a part of it.

    Args:
        page: its name, for messages.

    Raises:
        ValueError: it has not; the message names page and line.
    """
    opened = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if "<!-- table" in line:
            if opened:
                raise ValueError(f"{page}: the table of line {opened} has no <!-- end --> before that of line {number}")
            if not _BEGIN.fullmatch(line):
                raise ValueError(
                    f"{page}, line {number}: expected <!-- table KIND RECORD --> alone, not {line.strip()}"
                )
            opened = number
        elif line.startswith("<!-- end"):
            if not opened or line != "<!-- end -->":
                raise ValueError(f"{page}, line {number}: {line.strip()!r} ends no table")
            opened = 0
    if opened:
        raise ValueError(f"{page}: the table of line {opened} has no <!-- end -->")
