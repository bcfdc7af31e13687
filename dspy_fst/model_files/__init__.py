"""What a model's folder, or its name on a hub, tells before any weights are loaded.

In: a path or a name. Out: the architecture, its limits, what is missing, or a sentence that refuses it. Of the weights
only names and shapes are read here; `architectures.load_model` alone loads them.
"""
