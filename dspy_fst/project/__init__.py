"""A project file, or the settings that a run recorded in its place, as objects.

In: YAML with ``module:attribute`` names. Out: the arguments of `FSTOptimizer.compile`. All faults are reported
together, before anything heavy is imported.
"""
