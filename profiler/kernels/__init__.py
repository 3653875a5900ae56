"""What a layer is computed with: matrix products, attention, element-wise work, rotation, and recorded work.

May import `profiler.hardware` and `profiler.model`.
"""
