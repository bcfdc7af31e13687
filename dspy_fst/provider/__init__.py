"""DSPy's optimizers of weights, `dspy.BootstrapFinetune` and `dspy.teleprompt.grpo.GRPO`, on our trainer and engines.

In: what DSPy hands to the provider of an LM, as chat messages and rewards. Out: published weights that a PolicyLM
serves, verified, each job in a folder of its own. Nothing here trains: it is `dspy_fst.slow` that does.
"""
