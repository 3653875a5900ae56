"""Sizes of the buffers between ranks: they bound how many rounds a stage may be ahead of the next one."""

POSTED_AHEAD = 2
"""Receives that are posted at once."""
STAGED = 2
"""Hidden states on a card that wait to be sent, each at a place of its own."""
BOUNDARY_BUFFERS = {"cuda": POSTED_AHEAD + STAGED, "cpu": POSTED_AHEAD}
"""Hidden states that a rank holds before it runs them, and on a card before they are sent."""
GATHER_SLOTS = 2
"""Layers whose keys and values cards may gather at once in the memory that they share."""
SEND_BUFFER_BYTES = 512 << 20
"""What unfinished sends of a rank may hold on a CPU, where gloo never reports a send as completed."""
