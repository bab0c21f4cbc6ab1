"""``python -m utils.figures``, the earlier name of ``python -m utils figures``."""

import sys

from utils.commands.figures import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
