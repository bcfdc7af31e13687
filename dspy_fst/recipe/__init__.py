"""How settings are declared: the base class of every room's settings, and those of a LoRA adapter.

In: values of any kind. Out: frozen settings, or a sentence for each fault. It never imports torch, DSPy or another
room; `dspy_fst.config` composes the recipe that users see.
"""
