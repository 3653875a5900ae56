"""Work that is recorded; without a card it is the work itself."""

import torch

from profiler.kernels.recording import new_scratch, record

CPU = torch.device("cpu")


def test_on_a_cpu_each_replay_is_a_call() -> None:
    seen: list[int] = []
    replay = record(lambda: seen.append(len(seen)), CPU, new_scratch(CPU))
    assert seen == []  # recording runs nothing
    replay()
    replay()
    assert seen == [0, 1]
