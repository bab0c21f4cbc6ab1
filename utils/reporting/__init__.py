"""Floor 7: figures, tables, pages and notebooks, all made from records."""
