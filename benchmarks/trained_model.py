"""A small Llama that learned Python's library by the project's own training, kept on disk for all who use it.

Characters are the tokens. A model is found again by all that decides it: its sizes, steps and seed.
"""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from profiler.model import load_model_shape
from runtime.quantize.layers import perplexity
from runtime.run.prompts import TokenIds
from runtime.train.recipe import TrainingRecipe
from runtime.train.train import train
from tuner.plan.plan import Chunk, Parallel, Plan, Request

FIRST, LAST = 32, 126  # the characters that are tokens
HELD_OUT, CALIBRATION = 20_000, 8_000
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Sizes of a model and of its training's steps."""

    layers: int
    hidden: int
    channels: int
    sequence: int = 128
    batch: int = 8

    @property
    def name(self) -> str:
        """For a folder."""
        return f"{self.layers}x{self.hidden}x{self.channels}-of-{self.batch}x{self.sequence}"


SMALL = Size(layers=6, hidden=96, channels=256)


def library_text() -> list[int]:
    """Token ids of the modules of Python's library, in the order of their names."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in paths)
    return [code - FIRST for code in map(ord, text) if FIRST <= code <= LAST]


def pieces(ids: Sequence[int], length: int = 512) -> list[TokenIds]:
    """Sequences of at most so many tokens."""
    return [tuple(ids[start : start + length]) for start in range(0, len(ids), length)]


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


def begin(folder: Path, seed: int, size: Size = SMALL) -> Path:
    """A model as Transformers initialises it."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.channels, num_hidden_layers=size.layers,
        num_attention_heads=max(4, size.hidden // 32), num_key_value_heads=2, head_dim=32, vocab_size=LAST - FIRST + 1,
        max_position_embeddings=4096, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def plan_of(folder: Path, size: Size = SMALL) -> Plan:
    """A step of a batch of sequences in one round, on one rank."""
    shape = load_model_shape(str(folder))
    return Plan(
        model=dict(shape.config), precision="float32",
        parallel=Parallel(tp_size=1, pp_size=1, layer_partition=(shape.num_layers,)),
        requests=tuple(Request(id=f"r{index}", prompt_tokens=size.sequence) for index in range(size.batch)),
        rounds=(tuple(Chunk(index, 0, size.sequence) for index in range(size.batch)),),
    )  # fmt: skip


def trained(place: Path, seed: int, steps: int, size: Size = SMALL) -> Path:
    """The model of a seed after so many steps, learned where `place` does not hold it yet.

    What is interrupted goes on where it was.
    """
    folder = place / f"{size.name}-{steps}-steps-seed-{seed}"
    if not folder.exists():
        recipe = TrainingRecipe(steps=steps, learning_rate=3e-3, warmup_steps=steps // 12, seed=seed, save_every=100)
        begun = place / f"begun-{size.name}-{seed}"
        if not begun.exists():
            begin(begun, seed, size)
        train(plan_of(begun, size), recipe, weights=begun, sequences=[texts().learned], output=folder, num_threads=1)
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
