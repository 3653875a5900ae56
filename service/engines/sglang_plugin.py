"""A plug-in of SGLang (entry point `sglang.srt.plugins`): chunk sizes come from the plan that ISOCHUNK_PLAN names.

Written for SGLang 0.5.23, whose `DynamicChunkSizer.predict` is asked for the next chunk of the one request that is
partly done. Every rank decides for itself, and all read the same file, so that all decide alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

VARIABLE = "ISOCHUNK_PLAN"
SIZER = "sglang.srt.managers.scheduler_components.dynamic_chunk_sizer.DynamicChunkSizer"


def register() -> None:
    """Replace how SGLang sizes chunks, if a plan is named; called by SGLang before it starts."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{SIZER}.predict", predictor(path), HookType.REPLACE)
    HookRegistry.register(f"{SIZER}.profile_and_fit", ready, HookType.REPLACE)


def predictor(path: str) -> Callable[[Any, int], int]:
    """What stands for `predict`: the plan's chunk after so many tokens, on whole pages, within SGLang's own limit."""
    from service.engines.rules import ChunkTable
    from tuner.plan.plan import load_plan

    table = ChunkTable.of(load_plan(path))

    def predict(sizer: Any, history_len: int) -> int:
        page = max(1, int(sizer.page_size))
        size = min(table.size(history_len), int(sizer.max_prefill_tokens))
        return max(page, size // page * page)

    return predict


def ready(_sizer: Any, *_given: Any, **_named: Any) -> bool:
    """What stands for `profile_and_fit`: nothing need be measured."""
    return True
