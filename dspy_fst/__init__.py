"""Fast-Slow Training for DSPy: evolve a program's instructions and train its local LM's weights, together."""

from dspy_fst.compiled import load, save
from dspy_fst.config import FSTConfig
from dspy_fst.errors import ConfigurationError, FSTError
from dspy_fst.optimizer import FSTOptimizer
from dspy_fst.policy import PolicyLM

__all__ = ["ConfigurationError", "FSTConfig", "FSTError", "FSTOptimizer", "PolicyLM", "load", "save"]
