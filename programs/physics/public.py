"""Physics on the paper's data set: the same names as in `project`. The import downloads it."""

from programs.physics import build

TASK = build(seed=0, source="public", train=1024, val=128, test=256)
program, metric, trainset, valset = TASK.program, TASK.metric, TASK.trainset, TASK.valset
