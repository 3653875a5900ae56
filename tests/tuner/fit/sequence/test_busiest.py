"""The busiest rank's share of rows against routers that are drawn as a profile draws them."""

from __future__ import annotations

import pytest
import torch

from profiler.experts.routing import route
from profiler.model import model_from_config
from profiler.model.experts import Dispatch
from tests.profiler.experts.test_routing import CONFIG
from tuner.fit.sequence.busiest import busiest_share, skewed_share

DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 64, "n_shared_experts": 1, "num_experts_per_tok": 4,
    "n_group": 8, "topk_group": 2, "first_k_dense_replace": 0, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("added", "ranks"),
    [
        ({"num_experts": 8, "num_experts_per_tok": 2}, 4),
        ({"num_experts": 128, "num_experts_per_tok": 8}, 8),
        (DEEPSEEK, 8),
    ],
)
def test_a_skewed_router_sends_as_much_as_counted(added: dict[str, object], ranks: int) -> None:
    mlp = model_from_config(CONFIG | added, name="mixture").spread(1, beside=ranks, dispatch=Dispatch.ALL_TO_ALL)
    experts = mlp.layer.experts
    assert experts is not None
    random, owners, found = torch.Generator().manual_seed(5), torch.tensor(experts.owners), []
    for _ in range(60):
        logits = torch.randn(400, len(owners), generator=random) + torch.randn(len(owners), generator=random)
        owner = owners[route(experts.router, logits, None)[0]]
        found.append(max(float((owner == rank).any(dim=1).float().mean()) for rank in range(ranks)))
    expected = skewed_share(experts.router, tuple(experts.owners))
    assert sum(found) / len(found) == pytest.approx(expected, rel=0.06)
    assert experts.sent_share < busiest_share(experts) < expected
