"""Read a CSV or TSV as somebody's program wrote it: commas, semicolons or tabs, in UTF-8 or in UTF-16."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

_SEPARATORS = ",;\t"


def read_text_table(path: str | Path) -> pd.DataFrame:
    """All columns of a table as text, without blanks around names and entries; what is empty is ``""``.

    The separator is the one of comma, semicolon and tab that is most often in the first line.

    Raises:
        ValueError: no such file, or no table; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; give the path of a CSV")
    # spreadsheets write UTF-16 with this mark, and UTF-8 with one of its own
    start = path.read_bytes()[:2]
    encoding = "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        with path.open(encoding=encoding, newline="") as file:
            first = file.readline()
        separator = max(_SEPARATORS, key=first.count)
        table = pd.read_csv(path, sep=separator, encoding=encoding, dtype=str, keep_default_na=False)
    except (ValueError, UnicodeError) as error:
        raise ValueError(f"{path} is not a readable CSV ({error})") from error
    return table.rename(columns=lambda name: str(name).strip()).map(str.strip)
