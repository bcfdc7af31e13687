"""The engine of a vLLM server: launch, watch and restart it, ask it, publish weights to it.

In: what `engine.base.Engine` takes. Out: what it returns. vLLM itself runs in a process of its own and is imported only
in `served/`, the files that the server loads.
"""
