"""What is refused before any work: programs, examples, models, settings.

In: the arguments of a run. Out: faults or warnings, in sentences, all at once. Nothing is loaded, started or sampled.
"""
