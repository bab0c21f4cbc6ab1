"""Floor 2: from a folder, an archive or drawn phantoms to image sets that are split by patient."""
