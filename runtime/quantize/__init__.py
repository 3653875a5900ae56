"""Checkpoints made 8-bit: calibrated layer by layer, smoothed, written as compressed-tensors, with what it cost."""
