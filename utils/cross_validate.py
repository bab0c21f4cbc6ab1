"""``python -m utils.cross_validate``, the earlier name of ``python -m utils folds``."""

import sys

from utils.commands.folds import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
