"""Several vLLM servers as one engine.

In and out: see `engine.base.Engine`. Each server keeps its own `Supervisor`; this package decides which server gets a
call, when a publish is over, and what happens to the calls of a server that is lost.
"""
