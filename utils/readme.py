"""``python -m utils.readme``, the earlier name of ``python -m utils pages``."""

import sys

from utils.commands.pages import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
