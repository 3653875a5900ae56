"""Mixtures in 8 bits: published, quantized here, and quantized as they are read: the tokens of Transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from db.errors import UserError
from profiler.model import PRECISIONS, load_model_shape
from profiler.model.experts import Dispatch
from profiler.sequence.kind import SPKind
from runtime.quantize.quantize import quantize_checkpoint
from runtime.quantize.recipe import QuantizationRecipe
from runtime.weights.quantized import check_checkpoint
from tests.checkpoints import write_checkpoint
from tests.runtime.cases import PARTITIONS, prompts
from tests.runtime.run.test_quantized_runs import run
from tests.runtime.weights.test_quantized import DEEPSEEK, publish
from tuner.plan.plan import Parallel

# Sizes that blocks of 128 inputs can be cut from on two ranks; outputs of latents fill no whole block.
BLOCKS = {
    "hidden_size": 128, "intermediate_size": 256, "q_lora_rank": 128, "kv_lora_rank": 128, "v_head_dim": 64,
    "moe_intermediate_size": 128, "num_hidden_layers": 5,
}  # fmt: skip
# Rows are sent to experts on two ranks that share them.
SENT = Parallel(
    tp_size=1, pp_size=1, sp_size=2, sp_kind=SPKind.GATHER, ep_size=2, dispatch=Dispatch.ALL_TO_ALL,
    layer_partition=(5,),
)  # fmt: skip


def layout(tp_size: int, pp_size: int, ep_size: int = 1) -> Parallel:
    return Parallel(tp_size=tp_size, pp_size=pp_size, ep_size=ep_size, layer_partition=PARTITIONS[pp_size])


@pytest.mark.timeout(180)
def test_tokens_of_published_and_of_quantized_mixtures(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    int8 = publish(checkpoint("Qwen3MoeForCausalLM"), tmp_path / "int8", "int8 W8A8")
    deepseek = publish(
        write_checkpoint(tmp_path / "plain", "DeepseekV3ForCausalLM", **BLOCKS), tmp_path / "deepseek", DEEPSEEK
    )
    for folder, precision in ((int8, "w8a8"), (deepseek, "w8a16")):
        shape = load_model_shape(str(folder))
        assert shape.backend == "own"
        assert shape.quantization is not None and shape.quantization.precision() == precision
        check_checkpoint(folder, shape, PRECISIONS[precision])
    source, made = checkpoint("Qwen2MoeForCausalLM"), tmp_path / "made"
    report = quantize_checkpoint(
        source, made, load_model_shape(str(source)), PRECISIONS["fp8"],
        QuantizationRecipe(linears=PRECISIONS["fp8"].linears, smooth=0.5),  # type: ignore[arg-type]
        calibration=prompts(150), held_out=prompts(120), device=torch.device("cpu"),
    )  # fmt: skip
    experts = [linear for linear in report.linears if linear.linear.startswith("experts.")]
    assert len(experts) == 4 * 8 * 2  # of the five layers one is dense
    assert all(0.001 < linear.weight_error < 0.04 and not linear.kept for linear in experts)
    assert {linear.linear for linear in report.linears if linear.kept} == {"router", "shared_gate"}
    assert report.perplexity_loss is not None and abs(report.perplexity_loss) < 0.05
    assert report.written_bytes < 0.5 * report.source_bytes
    run(
        [
            (int8, "w8a8+float32", layout(1, 2)),
            (int8, "w8a16+float32", layout(2, 1, 2)),
            (deepseek, "w8a16+float32", layout(2, 1, 2)),
            (int8, "w8a16+float32", SENT),
            (made, "fp8+float32", layout(1, 2)),
            (checkpoint("MixtralForCausalLM"), "w8a16+float32", layout(2, 1)),
        ],
        world_size=2,
    )


def test_what_mixtures_do_not_run_in_is_refused(checkpoint: Callable[[str], Path]) -> None:
    shape = load_model_shape(str(checkpoint("Qwen3MoeForCausalLM")))
    with pytest.raises(UserError, match=r"^precision: fp8-static; w8a16, w8a8 or fp8: experts of .* found beforehand"):
        shape.check_precision(PRECISIONS["fp8-static"], field="precision")
    with pytest.raises(UserError, match=r"^precision: w8a8\+kv-int8; one of plain keys and values"):
        shape.check_precision(PRECISIONS["w8a8+kv-int8"], field="precision")
    stacked = load_model_shape(str(checkpoint("GptOssForCausalLM")))
    with pytest.raises(UserError, match=r"^precision: w8a8; a plain one: all experts of a layer of .* are one tensor"):
        stacked.check_precision(PRECISIONS["w8a8"], field="precision")
