"""One stage on one rank: its KV slab, and running a round through its layers.

May import `runtime.weights`.
"""
