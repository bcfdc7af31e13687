"""Base models of a million parameters for the programs here, and a proposer that needs no language model."""

from pathlib import Path

from programs.tiny.proposer import SkillProposer

RECKON, PAPER = (Path(__file__).parent / "bases" / name for name in ("reckon", "paper"))
"""Folders of the base models (see `pretrain`): of Reckon, and of the paper's programs."""

__all__ = ["PAPER", "RECKON", "SkillProposer"]
