"""One recipe, one run: its settings, its course, what it leaves behind."""
