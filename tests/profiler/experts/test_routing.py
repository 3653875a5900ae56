"""How many rows go to a group of experts: by what plans count messages with, and by drawing; none of padding."""

from __future__ import annotations

import pytest
import torch

from profiler.experts.experts import Experts, ExpertWeights
from profiler.experts.products import GroupedLinear
from profiler.kernels.linear import Linear
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


@torch.inference_mode()
def test_no_expert_is_asked_of_rows_behind_the_tokens() -> None:
    shape = model_from_config(CONFIG | {"num_experts": 8, "num_experts_per_tok": 2}, name="mixture")
    mlp = shape.layer.experts
    assert mlp is not None
    torch.manual_seed(5)
    asked = list[int]()

    class Counted(GroupedLinear):
        def __call__(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            asked.append(x.shape[0])
            return super().__call__(x, ends)

    weights = ExpertWeights(gate_up=Counted(torch.randn(8, 64, 64)), down=Counted(torch.randn(8, 64, 32)))
    experts = Experts(mlp, weights, first=0, router=Linear(torch.randn(8, 64)))
    x = torch.randn(20, 64)
    whole, cut = experts(x), experts(x, 13)
    torch.testing.assert_close(cut[:13], whole[:13], rtol=1e-4, atol=1e-3)  # other sizes of products
    assert not cut[13:].any() and asked == [40, 40, 26, 26]
