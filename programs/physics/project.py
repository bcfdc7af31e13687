"""Physics offline as a project of the command line: what `paper.yaml` names."""

from programs.physics import build

TASK = build(seed=0)
program, metric, trainset, valset = TASK.program, TASK.metric, TASK.trainset, TASK.valset
