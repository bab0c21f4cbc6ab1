"""``python -m utils.robustness``, the earlier name of ``python -m utils robustness``."""

import sys

from utils.commands.robustness import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
