"""The planning target (model, requests, device), and the largest rounds of a layout that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from db.errors import UserError
from profiler.model import PRECISIONS, ModelShape
from profiler.model.precision import Precision
from tuner.plan.layout import Layout
from tuner.plan.memory import RUNTIME_BYTES, USABLE_SHARE, RankMemory, memory_refusal, needed_bytes, rank_memory
from tuner.plan.plan import Parallel, Request, Weights
from tuner.plan.round_sizes import RoundSizes
from tuner.rounds.problem import Limits
from tuner.search.partition import even_partition

TIGHTER = 0.8  # of limits under which a plan still took too much memory: slabs have gaps between prompts
MORE_STAGES = (2, 4, 8, 16)
NARROWER = "w8a16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The planning target: the model in a precision, the requests, and the device."""

    shape: ModelShape
    dtype: str
    requests: tuple[Request, ...]
    device_type: str
    memory_bytes: int
    max_new_tokens: int = 1
    threads_per_rank: int | None = None
    layer_partition: tuple[int, ...] | None = None
    """Layers of each group, where the user keeps them; None leaves them to the search."""

    def __post_init__(self) -> None:
        kept = self.layer_partition
        if kept is not None and (sum(kept) != self.shape.num_layers or min(kept) < 1):
            allowed = f"at least one layer each, {self.shape.num_layers} in all"
            raise UserError("--layer-partition", ",".join(map(str, kept)), allowed)
        for request in self.requests:
            most = self.shape.max_positions - self.max_new_tokens + 1
            if request.prompt_tokens > most:
                allowed = f"at most {most} with {self.max_new_tokens} new tokens: {self.shape.positions_words}"
                raise UserError(f"prompt_tokens of request {request.id}", request.prompt_tokens, allowed)

    def refusal(self, layout: Layout, stages: Sequence[RankMemory]) -> str | None:
        """Why stages that need so much do not fit into the device's memory, or None when they do."""
        return memory_refusal(
            stages, stage_size=layout.stage_size, device_type=self.device_type, memory_bytes=self.memory_bytes
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The rounds of a layout, with these layers a group, that fit into a device's memory.

    Weights, what the runtime holds and the longest prompt's KV are there whatever the rounds; what is left is shared
    by the activations of the largest round and the KV of the prompts that are held at once.
    """

    target: Target
    layout: Layout
    layer_partition: tuple[int, ...]
    chunk_multiple: int
    measured_tokens: int | None = None
    """Of the largest round that was measured: where memory asks for smaller ones, none is larger than that."""

    def choices(self, given: Limits) -> list[Limits]:
        """Ways to share what memory leaves: the largest rounds, and such that all stages can have one; none: none fit.

        Where KV is small beside activations, somewhat smaller rounds leave room for prompts that keep all stages busy.
        """
        found = [self.limits(given)]
        if found[0] is not None and found[0].max_kv_tokens is not None and self.layout.pp_size > 1:
            found.append(self.limits(given, in_flight=self.layout.pp_size))
        return [one for one in dict.fromkeys(found) if one is not None]

    def limits(self, given: Limits, *, in_flight: int = 1) -> Limits | None:
        """The largest rounds that fit, with the KV of so many of them, and of a prompt that begins beside; None: none
        fit.

        `given` comes back where memory asks for no more.
        """
        smallest, largest = self._round_range(given)
        most_rows = self._all_rows if given.max_kv_tokens is None else self._rows(given.max_kv_tokens)
        if self._fits(largest, most_rows):
            return given
        if self.measured_tokens is not None:
            largest = max(smallest, min(largest, self.measured_tokens))

        def rows_beside(tokens: int) -> int:
            return max(self._least_rows, min(most_rows, in_flight * tokens + self._longest_rows))

        units = _most(
            lambda units: self._fits(units * self.chunk_multiple, rows_beside(units * self.chunk_multiple)),
            1,
            largest // self.chunk_multiple,
        )
        tokens = smallest if units is None else max(units * self.chunk_multiple, smallest)
        rows = _most(lambda rows: self._fits(tokens, rows), self._least_rows, most_rows)
        if rows is None:
            return None
        kv_tokens = None if rows >= self._all_rows else max(rows - len(self.target.requests), self._longest_tokens)
        return Limits(max_round_tokens=tokens, max_kv_tokens=kv_tokens)

    def tighter(self, limits: Limits, given: Limits) -> Limits | None:
        """Limits under which a plan holds less; None where these are the tightest."""
        smallest, largest = self._round_range(given)
        tokens = limits.max_round_tokens or largest
        kv_tokens = limits.max_kv_tokens or sum(request.prompt_tokens for request in self.target.requests)
        least = Limits(max_round_tokens=smallest, max_kv_tokens=self._longest_tokens)
        if (tokens, kv_tokens) == (least.max_round_tokens, least.max_kv_tokens):
            return None
        fewer = int(TIGHTER * tokens) // self.chunk_multiple * self.chunk_multiple
        return Limits(
            max_round_tokens=max(fewer, smallest), max_kv_tokens=max(int(TIGHTER * kv_tokens), self._longest_tokens)
        )

    def refusal(self, given: Limits) -> str:
        """Why not even the smallest rounds fit, and what would help, as far as one change does."""
        smallest, _ = self._round_range(given)
        stages = self._memory(smallest, self._least_rows)
        why = self.target.refusal(self.layout, stages) or "needs more memory than there is"
        needed, _ = needed_bytes(stages, self.layout.stage_size, self.target.device_type)
        helps = [*self._helps(given), f"a memory of {needed / USABLE_SHARE / 2**30:.1f} GiB (--memory-gib)"]
        return f"{why} with rounds of {smallest} tokens, one prompt after another; it would fit with {', '.join(helps)}"

    def _helps(self, given: Limits) -> Iterator[str]:
        target, layout = self.target, self.layout
        others: list[tuple[str, Target, Layout]] = []
        if target.max_new_tokens > 1:
            others.append(("--max-new-tokens 1", replace(target, max_new_tokens=1), layout))
        for times in MORE_STAGES:
            if layout.num_groups * times <= target.shape.num_layers:
                more = replace(layout, pp_size=times * layout.pp_size, refusal=None)
                others.append((f"{more.pp_size} stages on {more.world_size} ranks", target, more))
        if self._precision.weights.num_bytes(1 << 10) > PRECISIONS[NARROWER].weights.num_bytes(1 << 10):
            others.append((f"--dtype {NARROWER}", replace(target, dtype=NARROWER), layout))
        found_stages = False
        for words, other, its_layout in others:
            of_stages = its_layout is not layout
            if found_stages and of_stages:
                continue
            partition = even_partition(target.shape.num_layers, its_layout.num_groups)
            room = Room(
                target=other, layout=its_layout, layer_partition=partition, chunk_multiple=self.chunk_multiple
            )  # fmt: skip
            if room.limits(given) is not None:
                found_stages |= of_stages
                yield words

    @property
    def _precision(self) -> Precision:
        return PRECISIONS[self.target.dtype]

    @property
    def _longest_tokens(self) -> int:
        return max(request.prompt_tokens for request in self.target.requests)

    @property
    def _longest_rows(self) -> int:
        return self._longest_tokens + self.target.max_new_tokens

    @property
    def _all_rows(self) -> int:
        """Of the slab if all prompts were held at once."""
        return self._rows(sum(request.prompt_tokens for request in self.target.requests))

    @property
    def _least_rows(self) -> int:
        """Of the slab where one prompt comes after another; cached prompts and those that decode stay to the end."""
        requests = self.target.requests
        if self.target.max_new_tokens > 1:
            return self._all_rows
        kept = [request.prompt_tokens + 1 for request in requests if request.cached_tokens]
        others = [request.prompt_tokens + 1 for request in requests if not request.cached_tokens]
        return sum(kept) + max(others, default=0)

    def _rows(self, kv_tokens: int) -> int:
        return kv_tokens + len(self.target.requests) * self.target.max_new_tokens

    def _round_range(self, given: Limits) -> tuple[int, int]:
        """The smallest and the largest number of tokens that a round's largest may have."""
        new_tokens = [request.new_tokens for request in self.target.requests]
        smallest, largest = min(self.chunk_multiple, max(new_tokens)), sum(new_tokens)
        return smallest, max(smallest, min(largest, given.max_round_tokens or largest))

    def _fits(self, tokens: int, slab_rows: int) -> bool:
        return self.target.refusal(self.layout, self._memory(tokens, slab_rows)) is None

    def _memory(self, tokens: int, slab_rows: int) -> tuple[RankMemory, ...]:
        target, parallel = self.target, parallel_of(self.layout, self.layer_partition)
        new_tokens = sum(request.new_tokens for request in target.requests)
        sizes = RoundSizes.of_limits(
            parallel, most_tokens=min(tokens, new_tokens), slab_rows=slab_rows, new_tokens=new_tokens,
            most_passed=self._longest_tokens,
        )  # fmt: skip
        return rank_memory(target.shape, parallel, sizes, dtype=target.dtype, device_type=target.device_type)


def parallel_of(layout: Layout, layer_partition: tuple[int, ...]) -> Parallel:
    """The layout with the layers of its groups."""
    return Parallel(
        tp_size=layout.tp_size,
        pp_size=layout.pp_size,
        layer_partition=layer_partition,
        sp_size=layout.sp_size,
        sp_kind=layout.sp_kind,
        virtual_stages=layout.virtual_stages,
        stage_order=layout.stage_order,
        weights=layout.weights,
        ep_size=layout.ep_size,
        dispatch=layout.dispatch,
    )


def least_memory_refusal(target: Target, layout: Layout, given: Limits, chunk_multiple: int) -> str | None:
    """Why the layout does not fit into memory whatever its partition and rounds, or None where it may.

    Of all ranks' weights and of the longest prompt's KV, the fullest rank holds at least the mean.
    """
    partition = even_partition(target.shape.num_layers, layout.num_groups)
    parallel = parallel_of(layout, partition)
    longest = max(request.prompt_tokens for request in target.requests)
    sizes = RoundSizes.of_limits(
        parallel, most_tokens=1, slab_rows=longest + target.max_new_tokens, new_tokens=1, most_passed=0
    )
    stages = rank_memory(target.shape, parallel, sizes, dtype=target.dtype, device_type=target.device_type)
    mean = RankMemory(
        weights_bytes=sum(stage.weights_bytes for stage in stages) // len(stages),
        kv_bytes=sum(stage.kv_bytes for stage in stages) // len(stages),
        activation_bytes=0,
        unsent_bytes=0,
        runtime_bytes=RUNTIME_BYTES[target.device_type],
    )
    if target.refusal(layout, (mean,) * (1 if target.device_type == "cuda" else len(stages))) is None:
        return None
    room = Room(target=target, layout=layout, layer_partition=partition, chunk_multiple=chunk_multiple)
    return room.refusal(given)


def with_gathered_weights(layout: Layout) -> Layout | None:
    """The layout with weights cut over the ranks of a sequence-parallel group, where these held them whole."""
    whole = layout.sp_size > 1 and layout.weights is Weights.WHOLE
    return replace(layout, weights=Weights.GATHERED) if whole else None


def _most(fits: Callable[[int], bool], least: int, most: int) -> int | None:
    """The largest number that fits, where all below one that fits do; None where the least does not."""
    if most < least or not fits(least):
        return None
    if fits(most):
        return most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least
