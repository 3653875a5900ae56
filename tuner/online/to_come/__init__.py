"""Requests to come: how they have come so far, the pace at which they are best run, and what a decision costs them."""
