"""Rounds as stretches of one line of all tokens.

The line with what its stretches take, and the search for the places at which to cut it.
"""
