"""Token sequences that a checkpoint is calibrated on or judged by, and hidden states of them layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch

from db.errors import UserError, cut
from db.files.documents import read_json_lines, read_utf8
from profiler.kernels.attention import available_kernels
from profiler.kernels.quantized.kv import KV, QuantizedKV, read_rows
from profiler.kernels.rotary import Rotary
from profiler.layers.decoder_layer import DecoderLayer, ResidualStream
from profiler.layers.prefill_inputs import RoundInputs, prepare_round
from profiler.model import LayerSpec, ModelShape
from runtime.run.prompts import PromptLine, TokenIds, Tokenizer

SEQUENCE_TOKENS = 512
BATCH_TOKENS = 2048
LEAST_TOKENS = 64
MOST_TEXT_BYTES = 64 << 20
ALL = slice(None)


def read_sequences(path: Path, tokenizer: Tokenizer, shape: ModelShape, *, field: str) -> tuple[TokenIds, ...]:
    """Sequences of at most `SEQUENCE_TOKENS` from a text file, or from JSONL lines with token_ids or text.

    Raises `UserError` for too few tokens and for ids that the model does not have.
    """
    length = min(SEQUENCE_TOKENS, shape.max_positions)
    found: list[TokenIds] = []
    if path.suffix == ".jsonl":
        for _, place, line in read_json_lines(path, PromptLine, field=field):
            ids = line.token_ids if line.token_ids is not None else tokenizer.encode(line.text or "")
            wrong = next((token for token in ids if not 0 <= token < shape.vocab_size), None)
            if wrong is not None:
                raise UserError(f"{place}: token_ids", wrong, f"0 to {shape.vocab_size - 1}")
            found += _pieces(ids, length)
    else:
        found += _pieces(tokenizer.encode(read_utf8(path, field=field, max_bytes=MOST_TEXT_BYTES)), length)
    tokens = sum(map(len, found))
    if tokens < LEAST_TOKENS:
        raise UserError(field, cut(path), f"{tokens} tokens in it: at least {LEAST_TOKENS} are needed")
    return tuple(found)


def _pieces(ids: TokenIds, length: int) -> Iterator[TokenIds]:
    pieces = (ids[start : start + length] for start in range(0, len(ids), length))
    return (piece for piece in pieces if len(piece) > 1)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Sequences that run together, one after another in the rows."""

    ids: torch.Tensor  # [T]
    lengths: tuple[int, ...]
    inputs: RoundInputs


class HiddenStates:
    """Hidden states of all sequences before some layer, batch by batch; they go through layer after layer."""

    def __init__(
        self,
        sequences: Sequence[TokenIds],
        shape: ModelShape,
        device: torch.device,
        dtype: torch.dtype,
        *,
        kv: torch.dtype | None = None,
    ) -> None:
        """kv: of 8 bits, in which keys and values are kept; None: plain."""
        self.device, self.dtype, self.kv = device, dtype, kv
        rotary, kernel = Rotary(shape, device), available_kernels(device, dtype)[0]
        self.batches = [
            _Batch(
                ids=torch.tensor([token for ids in group for token in ids], device=device),
                lengths=tuple(map(len, group)),
                inputs=prepare_round(
                    _chunks(group), rotary=rotary, choose_kernel=lambda *_: kernel, device=device, dtype=dtype
                ),
            )
            for group in _groups(sequences)
        ]
        self.states: list[torch.Tensor] = []

    @property
    def num_tokens(self) -> int:
        """Of all sequences."""
        return sum(sum(batch.lengths) for batch in self.batches)

    def copied(self) -> HiddenStates:
        """The same states, to go through other layers."""
        made = copy(self)
        made.states = [hidden.clone() for hidden in self.states]
        return made

    def embed(self, embedding: torch.Tensor) -> None:
        """Begin: embedding [V, hidden]."""
        self.states = [embedding[batch.ids].to(self.dtype) for batch in self.batches]

    def run(
        self, layer: DecoderLayer, spec: LayerSpec, kv_scales: tuple[float, float] | None = None
    ) -> tuple[float, float]:
        """Through a layer: what is held is then what comes before the next. Returns where keys and values end.

        kv_scales: of all keys and of all values kept in 8 bits; None finds one for each token and head.
        """
        kv_heads, head_dim = spec.attention.kv_heads.count, spec.attention.head_dim
        ends = [0.0, 0.0]
        for index, (batch, hidden) in enumerate(zip(self.batches, self.states, strict=True)):
            size = (kv_heads, hidden.shape[0], head_dim)
            slabs: list[KV]
            if self.kv is None:
                slabs = list(torch.empty(2, *size, device=self.device, dtype=self.dtype))
            else:
                slabs = [
                    QuantizedKV.zeros(size, kept=self.kv, dtype=self.dtype, device=self.device, static=scale)
                    for scale in kv_scales or (None, None)
                ]
            self.states[index] = layer(ResidualStream(hidden), batch.inputs, *slabs).added()
            ends = [max(end, float(read_rows(slab, ALL).abs().max())) for end, slab in zip(ends, slabs, strict=True)]
        return ends[0], ends[1]

    def targets(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """After the last layer: hidden states [P, hidden] of all tokens but each sequence's last, and the next ids."""
        for batch, hidden in zip(self.batches, self.states, strict=True):
            first = 0
            for length in batch.lengths:
                yield hidden[first : first + length - 1], batch.ids[first + 1 : first + length]
                first += length


def _groups(sequences: Sequence[TokenIds]) -> Iterator[list[TokenIds]]:
    group: list[TokenIds] = []
    for ids in sequences:
        if group and sum(map(len, group)) + len(ids) > BATCH_TOKENS:
            yield group
            group = []
        group.append(ids)
    if group:
        yield group


def _chunks(group: Sequence[TokenIds]) -> list[tuple[int, int, int]]:
    chunks, start = [], 0
    for ids in group:
        chunks.append((start, 0, len(ids)))
        start += len(ids)
    return chunks
