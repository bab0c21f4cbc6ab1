"""``python -m utils.prepare``, the earlier name of ``python -m utils prepare``."""

import sys

from utils.commands.prepare import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
