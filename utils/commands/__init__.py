"""Floor 8: the command line, a thin file for each verb of ``python -m utils``."""
