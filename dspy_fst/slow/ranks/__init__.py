"""Several processes that train one policy, as torchrun starts them.

Rank 0 samples, searches and keeps the run. It calls its trainer, and the other ranks make the same calls on theirs. In:
a call of rank 0's trainer. Out: the same result on every rank, or an error that names the rank which failed. Other
ranks start no engine. They write their part of a state, where they share the weights, and else nothing.
"""
