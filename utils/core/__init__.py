"""Floor 1: paths, processes, precision, seeds, radii and checks of settings; knows nothing of images or models."""
