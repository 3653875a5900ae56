"""A prefix cache over a trace's block hashes: which tokens of each prompt are cached when it arrives.

Traces name a prompt's blocks of tokens by hashes of everything up to their end, so that equal hashes are equal
prefixes. A prompt hits as many of its first blocks as are cached; then all its blocks are, the least recently used
ones leaving when there is no room. A prompt counts as cached from its arrival on: traces do not say when it was done.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PrefixCache:
    """Blocks by hash, the least recently used first."""

    def __init__(self, size_tokens: int | None, block_tokens: int) -> None:
        """size_tokens: tokens that it holds at most, None for no limit. block_tokens: tokens of a block."""
        self._most_blocks = None if size_tokens is None else size_tokens // block_tokens
        self._block_tokens = block_tokens
        self._blocks: OrderedDict[int | str, None] = OrderedDict()

    def hit_tokens(self, hashes: Sequence[int | str], prompt_tokens: int) -> int:
        """Tokens of a prompt that are cached; from here on its own blocks are. At least its last token is not."""
        hits = 0
        while hits < len(hashes) and hashes[hits] in self._blocks:
            hits += 1
        # The last blocks first: of a prefix that is dropped in part, the end is what nobody can use alone.
        for block in reversed(hashes):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while self._most_blocks is not None and len(self._blocks) > self._most_blocks:
            self._blocks.popitem(last=False)
        return min(hits * self._block_tokens, prompt_tokens - 1)
