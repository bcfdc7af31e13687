"""One run of the program under the policy: a candidate's texts and a problem in, a `Rollout` out.

A rollout holds each call's exact tokens, a reward in the recipe's range, and an outcome. A failure of the policy gets a
failure score. A failure around the policy is masked and counted with its reason. Nothing here changes weights or texts.
"""
