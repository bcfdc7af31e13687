"""A run in progress: checked, opened, stepped, validated, published and closed.

In: a student, a recipe and examples. Out: a `Session` whose verbs are the lines of the loop in `optimizer.py`, and at
the end the compiled program (`result`).
"""
