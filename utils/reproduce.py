"""``python -m utils.reproduce``, the earlier name of ``python -m utils reproduce``."""

import sys

from utils.commands.reproduce import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
