"""Checks made before any work: each module tells, in sentences, what a run would otherwise meet when it is paid for."""
