"""How a rollout ended, as a type. In: a kind, a reason and a detail, or a label from an event. Out: the same, typed.

Events and reports keep labels such as ``"masked: timeout"``. This room alone writes and reads them; it judges nothing
(see `dspy_fst.rollout.outcome_rules`).
"""
