"""What people look at: progress while a run goes on, pages and plots of it (these need the extra ``report``)."""

NEEDS_EXTRA = "pages and plots of runs need jinja2 and matplotlib: pip install 'dspy-fst[report]'"
