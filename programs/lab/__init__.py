"""The miniature laboratory: hidden-rule worlds, and a base model small enough to ship that text really steers."""

from programs.lab.program import BASE, Lab, build
from programs.lab.proposer import FeedbackProposer
from programs.lab.world import World, load_world

__all__ = ["BASE", "FeedbackProposer", "Lab", "World", "build", "load_world"]
