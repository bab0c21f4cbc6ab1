"""Alzheimer MRI classification under attack, in floors: a package imports its own floor and those below."""
