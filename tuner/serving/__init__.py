"""Requests served over time: the pipeline's clock, a round at a time, and answers decoded beside prefill."""
