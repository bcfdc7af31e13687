"""Settings of the whole test run."""

import transformers
from hypothesis import settings

# Deadlines measure the machine's other work; a random example that fails once must fail again.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")
transformers.logging.disable_progress_bar()
