"""The slow step: weights move, texts do not. Groups are credited, one CISPO update is made, weights are published."""
