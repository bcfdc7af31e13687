"""Example programs for dspy_fst: each subpackage is one program with its data and its metric."""
