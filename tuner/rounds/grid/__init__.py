"""The bound on the chunk grid, for cost tables as they are: what rounds sum to, and how much work they can do."""
