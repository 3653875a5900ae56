"""Plans over 8-bit checkpoints give the tokens of Transformers multiplying numbers that were rounded alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from db.errors import UserError
from profiler.comm.ranks.launch import run_ranks
from profiler.model import PRECISIONS, load_model_shape
from profiler.model.shape import default_dtype
from profiler.sequence.kind import SPKind
from runtime.quantize.quantize import quantize_checkpoint
from runtime.quantize.recipe import QuantizationRecipe
from runtime.run.preparation import check_layout
from runtime.run.rank import run_jobs
from runtime.run.reference import check_tokens
from runtime.run.result import RequestResult
from tests.runtime.cases import PARTITIONS, make_job, make_plan, prompts
from tests.runtime.weights.test_quantized import publish
from tuner.plan.plan import Parallel

NEW_TOKENS = 5
# Dynamic ranges of inputs that are cut are found rank by rank: with more ranks they are finer, and not the same.
CUT_ALIKE = ("w8a16", "w8a8-static", "fp8-static")
DYNAMIC = ("w8a8", "fp8")
# Noise of 1e-6 on the embeddings moves logits of these models by so much: a number near the edge between two values
# of an 8-bit grid, and with it all that follows, goes the other way.
NEAR_TIE = 0.1
Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An 8-bit checkpoint in each precision, smoothed; static ranges of int8 have offsets."""

    @cache
    def make(precision: str) -> Path:
        source = checkpoint("llama")
        linears = PRECISIONS[precision].linears
        assert linears is not None
        folder = tmp_path_factory.mktemp("quantized") / precision
        quantize_checkpoint(
            source, folder, load_model_shape(str(source)), PRECISIONS[precision],
            QuantizationRecipe(linears=linears, smooth=0.5, asymmetric=precision == "w8a8-static"),
            calibration=prompts(300, 211), device=torch.device("cpu"),
        )  # fmt: skip
        return folder

    return make


def run(cases: list[tuple[Path, str, Parallel]], world_size: int) -> None:
    jobs = [
        make_job(folder, dtype=precision, parallel=parallel, max_new_tokens=NEW_TOKENS)
        for folder, precision, parallel in cases
    ]
    reports = run_ranks(run_jobs, jobs, world_size=world_size, device_type="cpu", num_threads=1)
    for (folder, precision, parallel), job, *ranks in zip(cases, jobs, *reports, strict=True):
        (found,) = [rank.token_ids for rank in ranks if rank.token_ids is not None]
        results = [RequestResult(id=str(index), token_ids=ids, ttft_s=1.0) for index, ids in enumerate(found)]
        checks = check_tokens(
            results, job.prompts, folder, dtype=precision, max_new_tokens=NEW_TOKENS, end_ids=frozenset()
        )
        for check in checks:
            close = check.top2_margin is not None and check.top2_margin < NEAR_TIE
            linears = PRECISIONS[precision].linears
            rounds = linears is not None and linears.activations is not None
            fair = (rounds or PRECISIONS[precision].has_kv_scales) and close
            assert check.equal or fair, f"{folder.name} {precision} {parallel}: {found}, {check}"
        assert any(check.equal for check in checks)


def layout(tp_size: int, pp_size: int) -> Parallel:
    return Parallel(tp_size=tp_size, pp_size=pp_size, layer_partition=PARTITIONS[pp_size])


@pytest.mark.timeout(180)
def test_stages_give_the_tokens_of_rounded_products(made: Made) -> None:
    run([(made(name), f"{name}+float32", layout(1, 2)) for name in (*CUT_ALIKE, *DYNAMIC)], world_size=2)


@pytest.mark.timeout(180)
def test_cut_weights_give_the_tokens_of_rounded_products(made: Made) -> None:
    run([(made(name), f"{name}+float32", layout(2, 1)) for name in CUT_ALIKE], world_size=2)


@pytest.mark.timeout(180)
def test_stages_of_cut_weights_do_too(made: Made) -> None:
    run([(made(name), f"{name}+float32", layout(2, 2)) for name in CUT_ALIKE], world_size=4)


@pytest.mark.timeout(180)
def test_rows_cut_between_products_are_gathered_in_8_bits(made: Made) -> None:
    parallel = Parallel(tp_size=2, pp_size=1, layer_partition=(5,), sp_kind=SPKind.MEGATRON)
    run([(made(name), f"{name}+float32", parallel) for name in CUT_ALIKE], world_size=2)


@pytest.mark.timeout(180)
def test_ranks_that_share_rows_give_the_tokens_of_rounded_products(made: Made) -> None:
    parallel = Parallel(tp_size=1, pp_size=1, layer_partition=(5,), sp_size=2, sp_kind=SPKind.GATHER)
    run([(made(name), f"{name}+float32", parallel) for name in (*CUT_ALIKE, *DYNAMIC)], world_size=2)


@pytest.mark.timeout(180)
def test_published_layouts_run(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    published = {
        name: publish(checkpoint("llama"), tmp_path / name.replace(" ", "-"), name)
        for name in ("int8 W8A8", "int8 groups", "fp8 blocks", "ModelOpt FP8")
    }
    run(
        [
            (published["int8 W8A8"], "w8a8+float32", layout(1, 2)),
            (published["int8 groups"], "w8a16+float32", layout(1, 2)),
            (published["fp8 blocks"], "w8a16+float32", layout(1, 2)),
            (published["ModelOpt FP8"], "fp8-static+float32", layout(2, 1)),
            (published["fp8 blocks"], "float32", layout(1, 2)),  # dequantized as it is read
        ],
        world_size=2,
    )


@pytest.mark.timeout(180)
def test_keys_and_values_in_8_bits_give_the_tokens_of_rounded_ones(
    made: Made, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    scaled = publish(checkpoint("llama"), tmp_path / "scaled", "int8 W8A8", kv_scales=(0.02, 0.03))
    assert default_dtype(load_model_shape(str(scaled)), "cpu") == "w8a8+float32+kv-fp8"
    megatron = Parallel(tp_size=2, pp_size=1, layer_partition=(5,), sp_kind=SPKind.MEGATRON)
    ulysses = Parallel(tp_size=1, pp_size=1, layer_partition=(5,), sp_size=2, sp_kind=SPKind.ULYSSES)
    run(
        [
            (checkpoint("llama"), "float32+kv-int8", layout(1, 2)),
            (made("w8a8-static"), "w8a8-static+float32+kv-fp8", layout(2, 1)),
            (checkpoint("llama"), "float32+kv-int8", megatron),
            (checkpoint("llama"), "float32+kv-fp8", ulysses),
            (scaled, "w8a8+float32+kv-fp8", layout(1, 2)),
        ],
        world_size=2,
    )


def test_what_passes_keys_and_values_between_ranks_keeps_them_plain(checkpoint: Callable[[str], Path]) -> None:
    parallel = Parallel(tp_size=1, pp_size=1, layer_partition=(5,), sp_size=2, sp_kind=SPKind.RING)
    plan = make_plan(checkpoint("llama"), precision="float32+kv-int8", parallel=parallel)
    with pytest.raises(UserError, match=r"sp_kind: ring; one of none, ulysses, megatron: float32\+kv-int8 keeps keys"):
        check_layout(plan, load_model_shape(str(checkpoint("llama"))), max_new_tokens=1, device_type="cpu")


@pytest.mark.timeout(180)
def test_plain_weights_are_quantized_as_they_are_read(checkpoint: Callable[[str], Path]) -> None:
    cases = [(checkpoint(variant), "w8a8+float32", layout(1, 2)) for variant in ("qwen3", "phi3", "olmo2")]
    cases += [(checkpoint("llama-bias-one-kv-head"), "w8a16+float32", layout(2, 1))]
    run(cases, world_size=2)
