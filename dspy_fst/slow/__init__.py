"""The slow step: weights move, texts do not. Groups are credited and make one CISPO update.

In: groups of rollouts. Out: a batch, its loss, new weights and what the update measured. Nothing is sampled here.
"""
