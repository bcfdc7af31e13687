"""The policy plays the program: a candidate's texts and a problem in, a `Rollout` out.

A rollout holds each call's exact tokens, a reward in the recipe's range, and an outcome. What the policy did wrong is
scored; what failed around it is masked and counted with its reason. Nothing here changes weights or texts.
"""
