"""Kills a small run at seeded moments, continues it and compares it with one that nobody killed."""
