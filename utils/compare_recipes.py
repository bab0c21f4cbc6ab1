"""``python -m utils.compare_recipes``, the earlier name of ``python -m utils recipes``."""

import sys

from utils.commands.recipes import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
