"""A layer that is timed behind a context does what it does in the model: what was made for it, and what it keeps."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from profiler.library.found import find
from profiler.library_layers.timed import TimedLayer
from tests.library_models import make_model

ROWS = 96


def _note(seen: list[int], _args: object, _kwargs: object) -> None:
    seen.append(1)


@pytest.mark.parametrize("architecture", ["GptOssForCausalLM", "DeepseekV3ForCausalLM"])
@torch.inference_mode()
def test_a_layer_behind_a_context_is_the_layer_in_its_model(architecture: str) -> None:
    config = make_model(architecture).config.to_dict() | {"architectures": [architecture]}
    timed = TimedLayer(find(config), 1, rows=ROWS, device=torch.device("cpu"), dtype=torch.float32)
    for chunk, context in ((17, 0), (8, 70), (1, 95)):
        run = timed.run(chunk, context)
        once, again = run(0), run(1)
        assert once.shape == (1, chunk, timed.hidden_size)
        torch.testing.assert_close(once, again, rtol=0, atol=0)  # each call stands behind the same context
        timed.cache.pretend(context)
        entered: list[int] = []
        timed.part.entered = partial(_note, entered)
        hidden = torch.randn(chunk, timed.hidden_size)
        whole = timed.part.run(hidden, timed.cache, context)
        timed.part.entered = None
        assert whole.shape == hidden.shape and len(entered) == 1
        before = timed.before(chunk, context)
        assert before(0).shape == hidden.shape
        assert timed.cache.length == context  # nothing ran
