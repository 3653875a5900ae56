"""Attention: the rows of one mask, the kernel that each runs in, and the curve through them."""
