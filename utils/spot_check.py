"""``python -m utils.spot_check``, the earlier name of ``python -m utils spot-check``."""

import sys

from utils.commands.spot_check import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
