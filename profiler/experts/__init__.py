"""Routed experts on one rank: the choice of a router, products of each expert's rows, and their weighted sums."""
