"""The laboratory as a project of the command line: what `project.yaml` names."""

from programs.lab import FeedbackProposer, build

LAB = build("reverse_drop", seed=0)
program, metric, trainset, valset = LAB.program, LAB.metric, LAB.trainset, LAB.valset
propose = FeedbackProposer(seed=0)
