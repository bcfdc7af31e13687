"""Numbers and tables as people read them, in a terminal, a page or a notebook.

In: plain values. Out: text or HTML. Nothing here knows of runs, models or programs.
"""
