"""Records of runs, and what people see of them: tables, summaries, charts and pages.

In: a run's events or its directory. Out: `run_record.RunRecord`, and text, HTML or images made of it. Nothing here
changes a run. Charts and pages need the extra ``report``.
"""

NEEDS_EXTRA = "pages and plots of runs need jinja2 and matplotlib: pip install 'dspy-fst[report]'"
