"""What a model's folder, or its name on a hub, says before anything is loaded.

In: a path or a name. Out: the architecture, its limits, what is missing, or a sentence that refuses it. Weights are
never read here, except for their names and shapes.
"""
