"""One operation that the base does badly even when told and learns slowly: a ceiling that is far off."""

from programs.lab.world import World, operations

WORLD = World(name="descending", answer=operations("descending"), told="Sort downwards.")
