"""A small Llama that learned Python's library by the project's own training, kept on disk for all who use it.

Characters are the tokens. A model is found again by all that decides it: its sizes, steps and seed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from benchmarks.quantized_perplexity import FIRST, LAST, library_text, pieces
from profiler.model import load_model_shape
from runtime.quantize.layers import perplexity
from runtime.run.prompts import TokenIds
from runtime.train.recipe import Recipe
from runtime.train.train import train
from tuner.plan.plan import Chunk, Parallel, Plan, Request

SEQUENCE, BATCH, HELD_OUT, CALIBRATION = 128, 8, 20_000, 8_000
LAYERS, HIDDEN, CHANNELS = 6, 96, 256
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """What is learned, what calibrates, and what judges."""

    learned: TokenIds
    calibration: tuple[TokenIds, ...]
    held_out: tuple[TokenIds, ...]


@cache
def texts() -> Texts:
    """Of Python's library, read once."""
    ids = library_text()
    return Texts(
        learned=tuple(ids[:-HELD_OUT]),
        calibration=tuple(pieces(ids[100_000:][:CALIBRATION])),
        held_out=tuple(pieces(ids[-HELD_OUT:])),
    )


def begin(folder: Path, seed: int) -> Path:
    """A model as Transformers initialises it."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=CHANNELS, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=LAST - FIRST + 1, max_position_embeddings=4096,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def plan_of(folder: Path) -> Plan:
    """A step of `BATCH` sequences in one round, on one rank."""
    shape = load_model_shape(str(folder))
    return Plan(
        model=dict(shape.config), precision="float32",
        parallel=Parallel(tp_size=1, pp_size=1, layer_partition=(shape.num_layers,)),
        requests=tuple(Request(id=f"r{index}", prompt_tokens=SEQUENCE) for index in range(BATCH)),
        rounds=(tuple(Chunk(index, 0, SEQUENCE) for index in range(BATCH)),),
    )  # fmt: skip


def trained(place: Path, seed: int, steps: int) -> Path:
    """The model of a seed after so many steps, learned where `place` does not hold it yet."""
    folder = place / f"{LAYERS}x{HIDDEN}x{CHANNELS}-{steps}-steps-of-{BATCH}x{SEQUENCE}-seed-{seed}"
    if not folder.exists():
        recipe = Recipe(steps=steps, learning_rate=3e-3, warmup_steps=steps // 12, seed=seed, save_every=100)
        begun = begin(place / f"begun-{seed}", seed)
        train(plan_of(begun), recipe, weights=begun, sequences=[texts().learned], output=folder, num_threads=1)
        shutil.rmtree(begun)
        shutil.rmtree(folder.with_name(f"{folder.name}.state"))
    return folder


def judge(folder: Path) -> float:
    """Perplexity of a plain checkpoint on the held-out text."""
    return perplexity(folder, load_model_shape(str(folder)), texts().held_out, CPU)


def write_texts(path: Path, sequences: Sequence[TokenIds]) -> Path:
    """A file of sequences as the commands read them."""
    lines = (json.dumps({"id": str(number), "token_ids": list(ids)}) for number, ids in enumerate(sequences))
    path.write_text("".join(f"{line}\n" for line in lines))
    return path
