"""The worlds that ship with the lab: one file each, holding a `WORLD`."""
