"""A step's inputs are those of a round of one token of every request, at positions that move on in place."""

from __future__ import annotations

import torch

from profiler.kernels.attention_kernel import AttentionKernel
from profiler.kernels.rotary import Rotary
from profiler.layers.decode_inputs import DecodeState, StepInputs
from profiler.layers.prefill_inputs import RoundInputs, prepare_round
from profiler.model import load_model_shape

CPU = torch.device("cpu")
STARTS, PROMPT_TOKENS = (70, 0, 31), (12, 31, 9)
ROTARY = Rotary(load_model_shape("llama-3.2-1b"), CPU)


def _step() -> DecodeState:
    return DecodeState(starts=STARTS, prompt_tokens=PROMPT_TOKENS, device=CPU)


def _both(num_steps: int) -> tuple[StepInputs, RoundInputs]:
    """Inputs after some steps, and those of the same work as a round."""
    step = _step()
    for _ in range(num_steps):
        step.advance()
    chunks = [(start, tokens + num_steps, 1) for start, tokens in zip(STARTS, PROMPT_TOKENS, strict=True)]
    as_round = prepare_round(
        chunks, rotary=ROTARY, choose_kernel=lambda *_: AttentionKernel.SDPA, device=CPU, dtype=torch.float32
    )
    return step.inputs(ROTARY, torch.float32), as_round


def test_positions_move_on_in_place() -> None:
    step = _step()
    address = step.positions.data_ptr()
    step.advance()
    step.advance()
    assert step.positions.tolist() == [14, 33, 11]
    assert step.inputs(ROTARY, torch.float32).lengths.tolist() == [15, 34, 12]
    step.restart()
    assert step.positions.tolist() == list(PROMPT_TOKENS)
    assert step.positions.data_ptr() == address


def test_a_step_is_a_round_of_single_tokens() -> None:
    for num_steps in (0, 5):
        found, expected = _both(num_steps)
        assert found.slab_rows.tolist() == expected.slab_rows.tolist()
        assert found.rotary.keys() == expected.rotary.keys()
        for mine, theirs in ((found.rotary[way], expected.rotary[way]) for way in found.rotary):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_a_step_writes_and_attends_as_a_round_does() -> None:
    torch.manual_seed(0)
    found, expected = _both(3)
    slab = torch.randn(2, 100, 64)
    slabs = [slab.clone(), slab.clone()]
    rows, q = torch.randn(3, 2, 64), torch.randn(3, 8, 64)
    for inputs, one in zip((found, expected), slabs, strict=True):
        inputs.write(rows, one)
    torch.testing.assert_close(slabs[0], slabs[1], rtol=0, atol=0)
    assert not torch.equal(slabs[0], slab)
    attended = [inputs.attend(q, slabs[0], slab) for inputs in (found, expected)]
    torch.testing.assert_close(attended[0], attended[1])
