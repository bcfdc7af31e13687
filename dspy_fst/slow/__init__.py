"""The slow step: weights move and texts do not. Groups are credited, and an update trains on the batch.

In: groups of rollouts. Out: a batch, new weights, and what the update measured. Nothing is sampled here.
"""
