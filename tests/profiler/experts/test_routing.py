"""How many rows go to a group of experts: by the formula that plans count messages with, and by drawing them."""

from __future__ import annotations

import pytest
import torch

from profiler.model import model_from_config
from profiler.model.experts import Dispatch

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 100, "moe_intermediate_size": 32,
    "max_position_embeddings": 512,
}  # fmt: skip


@pytest.mark.parametrize(("count", "per_token", "ranks"), [(8, 2, 4), (128, 8, 8), (9, 2, 4), (8, 8, 2), (256, 8, 32)])
def test_rows_go_to_a_group_as_often_as_counted(count: int, per_token: int, ranks: int) -> None:
    shape = model_from_config(CONFIG | {"num_experts": count, "num_experts_per_tok": per_token}, name="mixture")
    mlp = shape.spread(1, beside=ranks, dispatch=Dispatch.ALL_TO_ALL).layer.experts
    assert mlp is not None
    random = torch.Generator().manual_seed(5)
    chosen = torch.rand(20_000, count, generator=random).topk(per_token, dim=1).indices
    owner = torch.tensor(mlp.owners)[chosen]
    fullest = max(range(ranks), key=mlp.owners.count)
    found = float((owner == fullest).any(dim=1).float().mean())
    assert found == pytest.approx(mlp.sent_share, abs=0.015)
