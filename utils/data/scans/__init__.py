"""Whole heads: read them, take the skull off, lay them on the template and cut the slices that the models know."""
