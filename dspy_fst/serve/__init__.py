"""A compiled program over HTTP: a JSON endpoint of its own, and OpenAI's chat completions.

In: a loaded program. Out: a FastAPI application and the server that runs it. Serving never changes the program.
"""
