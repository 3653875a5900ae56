"""Products of 8-bit numbers, and the quantizing that comes before them, fused with element-wise work on CUDA."""
