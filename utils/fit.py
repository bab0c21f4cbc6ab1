"""``python -m utils.fit``, the earlier name of ``python -m utils train``."""

import sys

from utils.commands.train import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
