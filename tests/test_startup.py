"""Names, settings and refusals come at once: torch and transformers are imported when a model is needed."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "accelerate", "vllm", "datasets")
NAMES = "from dspy_fst import FSTOptimizer, PolicyLM"
POLICY = f"{NAMES}\nlm = PolicyLM('programs/lab/base', engine='in_process')"
REFUSED = f"""{POLICY}
import dspy
student = dspy.Predict("question -> answer")
student.lm = lm
try:
    FSTOptimizer(metric=lambda *_: 0.0, cycels=3)
except Exception as error:
    assert "cycles" in str(error), error
else:
    raise AssertionError
"""


@pytest.mark.parametrize("code", [NAMES, POLICY, REFUSED], ids=["names", "a policy", "a refusal"])
def test_nothing_heavy_is_imported_for(code):
    tell = f"{code}\nimport sys\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", tell], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
