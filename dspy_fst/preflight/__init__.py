"""Checks before any work: program, examples, model, engine and settings.

In: the arguments of a run. Out: faults and warnings as sentences, all at once. Nothing is loaded, started or sampled.
"""
