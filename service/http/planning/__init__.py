"""Plans made for callers elsewhere, in processes that cannot take more than their share."""
