"""CodeIO on the paper's data set: the same names as in `project`. The import downloads it."""

from programs.codeio import build

TASK = build(seed=0, source="public", train=6400, val=256, test=512)
program, metric, trainset, valset = TASK.program, TASK.metric, TASK.trainset, TASK.valset
