"""One stage on one rank: where it stands, its KV slab, and a round through its layers.

May import `runtime.weights`.
"""
