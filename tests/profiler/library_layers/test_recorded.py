"""Chunks whose work is recorded once and replayed in order give what they give when they are run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from profiler.library.found import find
from profiler.library_layers.part import StagePart
from tests.library_models import make_model

# Longer and shorter than the window; two requests in turn.
CHUNKS = ((0, 0, 5), (1, 0, 40), (0, 5, 50), (1, 40, 3), (0, 55, 1), (1, 43, 20))


@pytest.mark.parametrize("architecture", ["GptOssForCausalLM", "Qwen3MoeForCausalLM"])
@torch.inference_mode()
def test_replays_read_and_write_the_memory_of_their_recording(architecture: str) -> None:
    config = make_model(architecture).config.to_dict() | {"architectures": [architecture]}
    found = find(config)
    part = StagePart(found, range(1, 3), device=torch.device("cpu"), dtype=torch.float32)
    assert part.is_recordable
    launched, recorded = ([part.cache(80) for _ in range(2)] for _ in range(2))
    inputs = [torch.randn(tokens, int(found.text.hidden_size)) for _, _, tokens in CHUNKS]
    for cache in recorded:
        part.run(inputs[0], cache, 0)  # its memory
        cache.begin(0)
    expected = [part.run(x, launched[request], start) for x, (request, start, _) in zip(inputs, CHUNKS, strict=True)]
    replays = list[Callable[[], torch.Tensor]]()
    for x, (request, start, _) in zip(inputs, CHUNKS, strict=True):
        # Holds the very tensors that the chunk touches, as a graph on a card does, and nothing that Python decides.
        replays.append(make_fx(partial(part.run, x, recorded[request], start))())
    for _ in range(2):
        for replay, wanted in zip(replays, expected, strict=True):
            torch.testing.assert_close(replay(), wanted, rtol=1e-5, atol=1e-5)
