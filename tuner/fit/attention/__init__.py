"""Seconds of attention: its fitted curve, the measured rows behind it, and which kernel a plan takes at each size."""
