"""`python -m dspy_fst.cli`, the same as `dspy-fst`."""

from dspy_fst.cli import main

main()
