"""``python -m utils VERB``."""

import sys

if __name__ == "__main__":
    try:
        from utils.commands.verbs import main
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}; activate the environment into which env/requirements.txt was installed (README.md)")
    sys.exit(main())
