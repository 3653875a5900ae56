"""Attention times: the fitted curve, the measured rows it is fitted to, and the kernel chosen for each chunk."""
