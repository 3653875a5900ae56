"""From measured rows to the costs of a layer, with held-out errors, corrections by runs, and how sure a prediction is.

May import `tuner.plan.plan`.
"""
