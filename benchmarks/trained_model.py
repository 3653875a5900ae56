"""A small Llama that learns Python's library by the project's own training, kept on disk for all who use it.

    python -m benchmarks.trained_model [--steps 5000] [--seed 0] [--precision bfloat16] [--device cuda] [--folder DIR]

Characters are the tokens. A model is found again by all that decides it: its sizes, steps, precision and seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sysconfig
import time
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


SMALL = Size(layers=4, hidden=192, channels=576, batch=16)
FOLDER = Path("demo-out/smaller")


def library_text() -> list[int]:
    """Token ids of the modules of Python's library, in the order of their names."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in paths)
    return [code - FIRST for code in map(ord, text) if FIRST <= code <= LAST]


def pieces(ids: Sequence[int], length: int = SMALL.sequence) -> list[TokenIds]:
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


def begin(folder: Path, seed: int) -> Path:
    """A model as Transformers initialises it."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=SMALL.hidden, intermediate_size=SMALL.channels, num_hidden_layers=SMALL.layers,
        num_attention_heads=max(4, SMALL.hidden // 32), num_key_value_heads=2, head_dim=32,
        vocab_size=LAST - FIRST + 1, max_position_embeddings=4096, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def plan_of(folder: Path) -> Plan:
    """A step of a batch of sequences in one round, on one rank."""
    shape = load_model_shape(str(folder))
    return Plan(
        model=dict(shape.config), precision="float32",
        parallel=Parallel(tp_size=1, pp_size=1, layer_partition=(shape.num_layers,)),
        requests=tuple(Request(id=f"r{index}", prompt_tokens=SMALL.sequence) for index in range(SMALL.batch)),
        rounds=(tuple(Chunk(index, 0, SMALL.sequence) for index in range(SMALL.batch)),),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How long a model learns, in which precision and where."""

    steps: int
    precision: str = "float32"
    device_type: str = "cpu"

    @classmethod
    def of(cls, options: argparse.Namespace) -> Training:
        """As the command line says."""
        return cls(steps=options.steps, precision=options.precision, device_type=options.device)


def trained(place: Path, seed: int, training: Training) -> Path:
    """The model of a seed after its training, learned where `place` does not hold it yet.

    What is interrupted goes on where it was.
    """
    name = f"{SMALL.name}-{training.steps}-steps-{training.precision}-seed-{seed}"
    folder = place / name
    if not folder.exists():
        recipe = TrainingRecipe(
            steps=training.steps, learning_rate=3e-3, warmup_steps=training.steps // 12, seed=seed, save_every=100,
            precision=training.precision,
        )  # fmt: skip
        begun = place / f"begun-{name}"
        if not begun.exists():
            begin(begun, seed)
        train(
            plan_of(begun), recipe, weights=begun, sequences=[texts().learned], output=folder,
            device_type=training.device_type, num_threads=1,
        )  # fmt: skip
        shutil.rmtree(begun)
        shutil.rmtree(folder.with_name(f"{folder.name}.state"))
    return folder


def judge(folder: Path) -> float:
    """Perplexity of a plain checkpoint on the held-out text, in pieces as long as it learned."""
    return perplexity(folder, load_model_shape(str(folder)), texts().held_out, CPU)


def write_texts(path: Path, sequences: Sequence[TokenIds]) -> Path:
    """A file of sequences as the commands read them."""
    lines = (json.dumps({"id": str(number), "token_ids": list(ids)}) for number, ids in enumerate(sequences))
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def parser(description: str | None, *, steps: int) -> argparse.ArgumentParser:
    """The options of all that use the model. One thread: on busy cores threads wait longer than they work."""
    torch.set_num_threads(1)
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--steps", type=int, default=steps, help="of the training")
    made.add_argument("--precision", default="float32", help="of the training's activations")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the training")
    made.add_argument("--folder", type=Path, default=FOLDER, help="where trained models are kept")
    return made


def main() -> None:
    """Train, and say how good the model is."""
    options_of = parser(__doc__, steps=5000)
    options_of.add_argument("--seed", type=int, default=0)
    options = options_of.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    folder = trained(options.folder, options.seed, Training.of(options))
    print(f"{folder.name}: perplexity {judge(folder):.3f} after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
