"""The engine over a vLLM server: it launches, watches and restarts the server, and swaps its weights.

In and out: see `engine.base.Engine`. vLLM runs in a process of its own. It is imported only in `served/`, which holds
the files that the server loads.
"""
