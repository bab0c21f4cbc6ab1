"""``python -m utils VERB``."""

import sys

from utils.commands.verbs import main

if __name__ == "__main__":
    sys.exit(main())
