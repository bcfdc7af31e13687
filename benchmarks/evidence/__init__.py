"""The paper's claims as measurements: arms x worlds x seeds, one process a run, every cost counted."""
