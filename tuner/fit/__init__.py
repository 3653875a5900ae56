"""Fits the costs of a layer to measured rows, with held-out errors, corrections by runs, and a stated uncertainty.

May import `tuner.plan.plan`.
"""
