"""One base model of a million parameters for all programs here, and a proposer that needs no language model."""

from pathlib import Path

from programs.tiny.proposer import SkillProposer

BASE = Path(__file__).parent / "base"
"""Folder of the base model (see `pretrain`)."""

__all__ = ["BASE", "SkillProposer"]
