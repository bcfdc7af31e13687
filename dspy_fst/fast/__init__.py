"""The fast step: texts move, weights do not. GEPA evolves a population of K candidates under frozen weights.

In: the population, the problems of the search, a function that plays them. Out: candidates with their scores, K of them
chosen from the Pareto front.
"""
