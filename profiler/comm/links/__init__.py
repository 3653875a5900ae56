"""The rank mesh, process groups, and transfers of hidden states between stages.

May import `profiler.hardware`.
"""
