"""One file an attack, each with one registered class; see :mod:`utils.attacks.attack`."""
