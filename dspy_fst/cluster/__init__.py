"""Rollouts and trainer ranks on a Ray cluster. A run without the setting `ray` does not import Ray.

In: the address of a cluster, and what a process alone would do itself. Out: the same results, made on the cluster's
nodes. Rank 0 of the trainer, searches and the run directory stay in the process that began the run, which must be on a
node itself.
"""
