"""Names, settings and refusals come at once: torch and transformers are imported when a model is needed."""

import gc
import subprocess
import sys

import dspy
import pytest

from dspy_fst import FSTOptimizer
from dspy_fst.errors import ConfigurationError

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


@pytest.mark.slow
@pytest.mark.parametrize("code", [NAMES, POLICY, REFUSED], ids=["names", "a policy", "a refusal"])
def test_nothing_heavy_is_imported_for(code):
    tell = f"{code}\nimport sys\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", tell], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


UNADAPTED = """
import sys, tempfile
from pathlib import Path
from dspy_fst import PolicyLM
from dspy_fst.run.paired import difference
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from programs.lab import BASE
trainer = Trainer(BASE, TrainingSettings(), device="cpu")
engine = PolicyLM(BASE, engine="in_process").handle.engine
with tempfile.TemporaryDirectory() as folder:
    engine.load(trainer.publish(Path(folder) / "v", "v"))
engine.close()
print("interval", *difference([0.0, 0.5, 0.25], [1.0, 0.75, 0.25]).words.split())
print(*[name for name in ("peft", "bitsandbytes", "scipy.stats") if name in sys.modules])
"""


@pytest.mark.slow
def test_weights_without_an_adapter_and_intervals_need_neither_peft_nor_scipy_s_statistics():
    done = subprocess.run([sys.executable, "-c", UNADAPTED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    interval, *imported = done.stdout.splitlines()
    assert interval == "interval 95% interval -0.876 to 1.709, 3 problems"
    assert imported == [""]


@pytest.mark.parametrize("collected", [True, False])
def test_garbage_waits_for_checks_and_imports_and_is_collected_as_before_after_them(monkeypatch, collected):
    def refuse(*_, **__):
        raise ConfigurationError([f"collected: {gc.isenabled()}"])

    monkeypatch.setattr("dspy_fst.optimizer.check", refuse)
    optimizer = FSTOptimizer(metric=lambda *_: 0.0, progress=False)
    (gc.enable if collected else gc.disable)()
    try:
        with pytest.raises(ConfigurationError, match="collected: False"):
            optimizer.compile(dspy.Predict("question -> answer"), trainset=[])
        assert gc.isenabled() == collected
    finally:
        gc.enable()
