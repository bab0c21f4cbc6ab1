"""The end of every command: what went wrong in one line, and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Protocol

#: Ended by Ctrl-C, as shells count it.
STOPPED = 130


class Main(Protocol):
    """Takes a command's words, or those of this process, and returns its exit status."""

    def __call__(self, arguments: list[str] | None = None) -> int: ...  # noqa: D102


def command(main: Callable[[list[str] | None], int]) -> Main:
    """Let ``main`` end in one line: status 1 after an error, 130 after Ctrl-C, and never a traceback.

    Whatever was finished is stored, and the same command goes on from there.
    """

    @wraps(main)
    def guarded(arguments: list[str] | None = None) -> int:
        try:
            return main(arguments)
        except KeyboardInterrupt:
            print("\nstopped; the same command goes on from what is finished", file=sys.stderr)
            return STOPPED
        except KeyError as error:
            return _said(f"there is no entry {error} where one is needed; is a stored file damaged?")
        except (OSError, ValueError, RuntimeError, FloatingPointError) as error:
            return _said(str(error))

    return guarded


def _said(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 1
