"""A project file, and what a run's directory tells in its place: names become objects here.

In: YAML with ``module:attribute`` names. Out: the arguments of `FSTOptimizer.compile`. All faults are told together,
before anything heavy is imported.
"""
