"""A decoder layer known by its tensors and by what it keeps of a prompt: what is planned, and run by Transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from profiler.model.precision import Precision


class Mixer(StrEnum):
    """How a layer lets tokens see those before them."""

    FULL = "full attention"
    WINDOW = "sliding window"
    CHUNKED = "attention in blocks"  # of so many tokens, each block apart
    LATENT = "latent attention"  # keys and values compressed to one vector a token
    LINEAR = "linear attention"  # or Mamba: a state of fixed size
    CONVOLUTION = "short convolution"
    HYBRID = "attention beside a state"
    SHARED = "shared keys and values"  # those of an earlier layer
    NONE = "no mixing"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedExperts:
    """Routed experts: each token goes to `per_token` of `count`; shared ones see every token."""

    count: int
    per_token: int
    shared: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeLayer:
    """A layer that is timed, held and run as a whole.

    active_elements: numbers of matrices that a token is multiplied with. idle_elements: of experts it does not go to.
    pair_numbers: multiplications of a (query, key) pair: query heads times the features of a key and of a value.
    kv_numbers: what it keeps of a token. state_numbers: what it keeps of a prompt, however long.
    selected: keys that a sparse selection leaves of all, with `selector_numbers` multiplications a pair to choose them.
    """

    mixer: Mixer
    hidden_size: int
    tensors: tuple[tuple[str, tuple[int, ...]], ...] = field(repr=False)
    active_elements: int
    idle_elements: int = 0
    pair_numbers: int = 0
    kv_numbers: int = 0
    state_numbers: int = 0
    window: int | None = None
    selected: int | None = None
    selector_numbers: int = 0
    experts: RoutedExperts | None = None
    has_sinks: bool = False
    softcap: float | None = None

    @property
    def kind(self) -> str:
        """In words, as tables and rows name it."""
        words = [str(self.mixer) + (f" {self.window}" if self.window else "")]
        words += [f"{self.selected} selected keys"] if self.selected else []
        words += ["sinks"] if self.has_sinks else []
        words += [f"softcap {self.softcap:g}"] if self.softcap else []
        if self.experts:
            shared = " and shared" if self.experts.shared else ""
            words.append(f"{self.experts.per_token} of {self.experts.count} experts{shared}")
        return ", ".join(words)

    def num_elements(self, _tp_size: int = 1) -> int:
        """Its parameters."""
        return sum(math.prod(size) for _, size in self.tensors)

    def product_elements(self, _tp_size: int = 1) -> int:
        """Numbers that are multiplied and added once for every token: of routed experts those that it goes to."""
        return self.active_elements

    def weights_bytes(self, precision: Precision, _tp_size: int = 1) -> int:
        """Bytes of its weights; in 8 bits its matrices, the rest as it is."""
        matrices = sum(math.prod(size) for _, size in self.tensors if len(size) > 1)
        rest = self.num_elements() - matrices
        quantized = precision.linears.weights if precision.linears else precision.weights
        return quantized.num_bytes(matrices) + precision.weights.num_bytes(rest)

    def attention_flops(self, chunk: int, context: int) -> int:
        """FLOPs of all (query, key) pairs of a chunk: two for each multiplication."""
        pairs = seen_pairs(chunk, context, self.selected or self.window)
        selecting = self.selector_numbers * seen_pairs(chunk, context)
        return 2 * (self.pair_numbers * pairs + selecting)

    @property
    def attended_numbers(self) -> int:
        """Keys and values of a token as attention takes them: latents are expanded for it."""
        return self.pair_numbers if self.mixer is Mixer.LATENT else self.kv_numbers

    def kept_tokens(self, tokens: int) -> int:
        """Of so many tokens those whose keys and values are kept: with a window no more than it sees."""
        return tokens if self.window is None else min(tokens, self.window)


def seen_pairs(chunk: int, context: int, most: int | None = None) -> int:
    """(query, key) pairs of a chunk where each query sees at most the last `most` keys, its own included."""
    whole = chunk * context + chunk * (chunk + 1) // 2
    if most is None or context + chunk <= most:
        return whole
    growing = max(most - context, 0)  # queries that see all before them
    first = growing * context + growing * (growing + 1) // 2
    return first + (chunk - growing) * most
