from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from scipy.optimize import nnls

from db.errors import UserError
from db.rows.measurements import Measurement
from profiler.kernels.attention_kernel import AttentionKernel
from profiler.sequence.kind import SPKind
from tests.tuner.measured import CHUNKS, SHAPE, Machine, measure, relative
from tuner.fit.attention.curve import IN_PROPORTION, Waves, fit_attention
from tuner.fit.attention.kernels import chosen_kernels, kernel_choice, with_kernels
from tuner.fit.calibration import fit_calibration
from tuner.fit.curve import Floats, fit_curve, fit_line, least_squares_of_two, without_spikes
from tuner.fit.holdout import UNTESTED, held_out_errors
from tuner.fit.layer_costs import LayerCosts, table_grid
from tuner.fit.layer_fit import fit_layer_costs
from tuner.fit.rows import RankWork
from tuner.plan.attention_kernels import AttentionKernels
from tuner.plan.plan import Chunk, Parallel, Plan, Request

WORK = RankWork(shape=SHAPE, dtype="float32", tp_size=1)


def fitted(machine: Machine = Machine(), tp_size: int = 1) -> LayerCosts:  # noqa: B008 - frozen
    work = RankWork(shape=SHAPE, dtype="float32", tp_size=tp_size)
    return fit_layer_costs(measure(machine, tp_size=tp_size), work, busy_ranks=2)


def test_curve_goes_through_rising_points_and_never_falls_through_noise() -> None:
    curve = fit_curve([1, 2, 4, 8], [1.0, 2.0, 1.8, 4.0])
    at = curve(np.linspace(0, 20, 200))
    assert (np.diff(at) >= 0).all()
    assert curve(1) == pytest.approx(1.0)
    assert curve(8) == pytest.approx(4.0)
    assert 1.8 <= float(curve(3)) <= 2.0


def test_curve_is_constant_below_and_linear_beyond_the_points() -> None:
    curve = fit_curve([10, 20], [5.0, 7.0])
    assert curve(0) == pytest.approx(5.0)
    assert curve(40) == pytest.approx(11.0)


def test_line_has_no_negative_latency() -> None:
    latency, per_unit = fit_line([1, 2, 3], [0.5, 2.0, 3.5])
    assert latency == 0.0
    assert per_unit > 0.0


def test_curves_and_lines_are_those_of_scipys_general_solver() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        design = np.abs(rng.normal(size=(rng.integers(2, 9), 2))) * [1.0, 10.0 ** rng.uniform(0, 5)]
        target = rng.normal(size=len(design)) + rng.choice([-1, 0, 1])
        best, residual = nnls(design, target)
        found = least_squares_of_two(*design.T, target)
        assert (found >= 0.0).all()
        assert float(np.linalg.norm(design @ found - target)) == pytest.approx(residual, rel=1e-9, abs=1e-12), best
        x = np.sort(rng.integers(1, 60, size=rng.integers(1, 30))).astype(np.float64)
        seconds = x * np.abs(1.0 + 0.3 * rng.normal(size=len(x))) + 1e-6
        curve = fit_curve(x.tolist(), seconds.tolist())
        steps = (x[:, None] >= curve.knots).astype(np.float64)
        rises, _ = nnls(steps / seconds[:, None], np.ones(len(x)))
        assert curve.seconds == pytest.approx(np.cumsum(rises), rel=1e-9)


def test_columns_in_proportion_are_one() -> None:
    assert fit_line([4], [2.0]) == pytest.approx((0.0, 0.5))
    assert least_squares_of_two(np.ones(3), np.zeros(3), np.full(3, 2.0)).tolist() == [2.0, 0.0]


def test_a_spike_is_a_disturbance_and_a_slope_is_not() -> None:
    sizes = [4096, 16, 256, 1024]  # in any order; 256 took far too long
    assert without_spikes(sizes, [410.0, 4.0, 120.0, 100.0]) == pytest.approx([410.0, 4.0, 64.0, 100.0])
    for steady in ([16.0, 20.0, 100.0, 1000.0], [16.0, 250.0, 1100.0, 4000.0]):
        assert without_spikes([16, 256, 1024, 4096], steady) == pytest.approx(steady)
    assert without_spikes([16, 256], [1.0, 99.0]) == pytest.approx([1.0, 99.0])


def pair_seconds(chunk: int, context: int) -> float:
    return 1e-9 * (chunk * context + chunk * (chunk + 1) / 2)


ATTENTION_POINTS = [(c, p) for c in (256, 512, 1024, 2048) for p in (0, 4096, 8192, 16384)]


def test_attention_between_powers_of_two_follows_the_square() -> None:
    curve = fit_attention(*zip(*ATTENTION_POINTS, strict=True), [pair_seconds(c, p) for c, p in ATTENTION_POINTS])
    for c, p in ((700, 0), (1500, 10000), (3000, 30000)):
        assert relative(float(curve(c, p)), pair_seconds(c, p)) < 0.01


@pytest.mark.parametrize("disturbed", [{(512, 4096)}, {(512, 16384), (2048, 0)}, {(1024, p) for p in (0, 4096, 16384)}])
def test_attention_forgets_single_disturbed_points_and_a_chunk_that_was_disturbed(
    disturbed: set[tuple[int, int]],
) -> None:
    seconds = [pair_seconds(*at) * (1.9 if at in disturbed else 1.0) for at in ATTENTION_POINTS]
    curve = fit_attention(*zip(*ATTENTION_POINTS, strict=True), seconds)
    for c, p in ((512, 0), (512, 8192), (700, 16384), (1024, 12288), (2048, 0)):
        assert relative(float(curve(c, p)), pair_seconds(c, p)) < 0.02


CARD_WAVES = Waves(num_heads=32, num_multiprocessors=132, split_up_to=256)


def test_blocks_run_in_waves() -> None:
    # 1280 rows of 32 heads are 320 blocks: three waves of 132, as the 384 blocks of 1536 rows are.
    waves = CARD_WAVES(np.array([1024.0, 1280.0, 1536.0, 100_000.0]))
    assert waves == pytest.approx([2 * 132 / 256, 3 * 132 / 320, 3 * 132 / 384, 1.0], rel=1e-2)
    assert waves[1] * 1280 == pytest.approx(waves[2] * 1536)
    assert CARD_WAVES([16, 64, 100, 256]) == pytest.approx([4.0, 1.0, 1.28, 1.0])  # blocks of 64 rows
    assert (IN_PROPORTION([1, 1280]) == 1.0).all()


def test_attention_in_waves_is_predicted_between_the_measured_chunks() -> None:
    def seconds(chunk: int, context: int) -> float:
        return 1e-9 * chunk * (float(CARD_WAVES(chunk)) * context + chunk / 2)

    points = [(c, p) for c in (512, 1024, 2048, 4096, 8192) for p in (0, 8192, 65536)]
    curve = fit_attention(*zip(*points, strict=True), [seconds(c, p) for c, p in points], waves=CARD_WAVES)
    for c, p in ((1280, 65536), (1792, 30000), (2304, 65536), (3072, 8192)):
        assert relative(float(curve(c, p)), seconds(c, p)) < 0.02


def test_of_two_kernels_each_chunk_follows_its_own() -> None:
    """As on an H100 with 32 heads: up to 128 tokens one that splits the context, one wave for 129 to 512 tokens."""
    waves = replace(CARD_WAVES, split_up_to=128)

    def seconds(chunk: int, context: int) -> float:
        row_s = 7e-11 if chunk <= 128 else 3e-11
        return 1e-5 + row_s * chunk * float(waves(chunk)) * context

    points = [(c, p) for c in (16, 128, 512, 1024, 2048) for p in (0, 8192, 65536)]
    curve = fit_attention(*zip(*points, strict=True), [seconds(c, p) for c, p in points], waves=waves)
    for chunk in (1, 16, 40, 64, 65, 100, 128, 129, 200, 256, 400, 513, 640, 5000):
        assert relative(float(curve(chunk, 65536)), seconds(max(chunk, 16), 65536)) < 0.01, chunk


def test_a_chunk_measured_without_context_follows_chunks_of_its_own_kernel() -> None:
    points = [(c, p) for c in (16, 1024, 2048) for p in (0, 4096, 8192)] + [(256, 0)]
    slow = [pair_seconds(c, p) * (3.0 if c == 16 else 1.0) for c, p in points]

    def predicted(first_quick: int) -> float:
        curve = fit_attention(
            *zip(*points, strict=True), slow, kernel_of=lambda chunk: "quick" if chunk >= first_quick else "slow"
        )
        return float(curve(256, 8192))

    assert relative(predicted(256), pair_seconds(256, 8192)) < 0.01
    assert relative(predicted(1024), 3.0 * pair_seconds(256, 8192)) < 0.02


def test_a_profile_that_ended_too_early_is_refused() -> None:
    n, k = WORK.projections[2]
    rows = [r for r in measure(Machine()) if (r.shape.get("n"), r.shape.get("k")) != (n, k) or r.shape["m"] == 16]
    with pytest.raises(UserError, match=rf"matmul n={n} k={k} at 16 tokens alone.*goes on"):
        fit_layer_costs(rows, WORK, busy_ranks=2)


def test_plans_beyond_the_shortest_part_are_extrapolated() -> None:
    rows = [row for row in measure(Machine()) if row.op != "elementwise" or row.shape["tokens"] <= 1024]
    assert fit_layer_costs(rows, WORK, busy_ranks=2).max_chunk == 1024
    assert fitted().max_chunk == max(CHUNKS)


def test_a_stage_costs_what_its_layers_cost() -> None:
    machine = Machine()
    model = fitted(machine).cost_model((10, 6))
    for chunk, context in ((512, 0), (1024, 3000), (2048, 6144)):
        true_s = 10 * machine.layer_us(WORK, chunk, context) * 1e-6
        assert relative(model.stage_seconds(0, [(chunk, context, False)]), true_s) < 0.03


def test_small_rounds_cost_their_launches_and_not_their_flops_alone() -> None:
    model = fitted().cost_model((16,))
    one, many = (model.stage_seconds(0, [(tokens, 0, False)]) for tokens in (1, 16))
    assert one == pytest.approx(many, rel=0.2)


def test_whole_layers_calibrate_their_parts() -> None:
    machine = Machine(layer_factor=1.3)
    costs = fitted(machine)
    assert costs.calibration.num_layers_measured == len(CHUNKS)
    model = costs.cost_model((16,))
    true_s = 16 * machine.layer_us(WORK, 1024, 2048) * 1e-6
    assert relative(model.stage_seconds(0, [(1024, 2048, False)]), true_s) < 0.03


def layer_row(chunk: int, context: int, *, attention_s: float) -> Measurement:
    """A layer whose token-wise work takes a microsecond a token."""
    us = chunk + 1e6 * attention_s
    return Measurement(
        op="layer", dtype="float32", shape={"chunk": chunk, "context": context}, group_size=1, busy_ranks=2,
        variant="", num_samples=20, median_us=us, p10_us=us, p90_us=us, min_us=us, std_us=0.0, noisy=False,
        measured_at=datetime.now(UTC), code_version="test",
    )  # fmt: skip


def microsecond_a_token(tokens: Floats) -> Floats:
    return 1e-6 * tokens


def test_a_chunk_whose_attention_to_the_context_is_slower_keeps_its_other_costs() -> None:
    """As one round of 64 prompts was predicted 20 % too fast once 65536 tokens met their attention to 65536 more."""
    curve = fit_attention(*zip(*ATTENTION_POINTS, strict=True), [pair_seconds(c, p) for c, p in ATTENTION_POINTS])
    layers = []
    for chunk in (256, 2048, 16384):
        for context in (0, 16384):
            alone_s = pair_seconds(chunk, 0)
            slower = 1.2 if chunk == 16384 else 1.0
            attention_s = alone_s + slower * (pair_seconds(chunk, context) - alone_s)
            layers.append(layer_row(chunk, context, attention_s=attention_s))
    calibration = fit_calibration(microsecond_a_token, curve, layers, ranks=1)
    largest = np.array([16384.0])
    assert calibration.tokens_factor(largest) == pytest.approx(1.0, abs=0.03)
    assert calibration.base_factor(largest) == pytest.approx(1.0, abs=0.05)
    assert calibration.context_factor(largest) == pytest.approx(1.2, abs=0.03)


def test_attention_of_short_chunks_does_not_calibrate_that_of_long_ones() -> None:
    curve = fit_attention(*zip(*ATTENTION_POINTS, strict=True), [pair_seconds(c, p) for c, p in ATTENTION_POINTS])
    layers = [
        # Alone, the attention of the shorter looks twice as slow as it is.
        layer_row(chunk, context, attention_s=(0.5 if chunk == 256 else 1.0) * pair_seconds(chunk, context))
        for chunk in (256, 2048)
        for context in (0, 4096, 16384)
    ]
    calibration = fit_calibration(microsecond_a_token, curve, layers, ranks=1)
    assert calibration.context_factor(np.array([256.0, 2048.0])) == pytest.approx([0.5, 1.0], abs=0.02)
    assert calibration.tokens_factor(np.array([256.0, 2048.0])) == pytest.approx([1.0, 1.0], abs=0.02)


def test_tables_hold_the_step_where_a_token_more_starts_another_tile() -> None:
    grid = table_grid().tolist()
    assert {64, 65, 512, 513, 576, 640, 641, 4096} <= set(grid) and grid == sorted(set(grid))


def test_the_fastest_attention_kernel_counts() -> None:
    machine = Machine()
    seconds = float(fitted(machine).attention(1024, 2048))
    assert relative(seconds, machine.attention_us(1024, 2048) * 1e-6) < 0.02


def test_tensor_parallel_pays_two_all_reduces_a_layer() -> None:
    costs = fitted(tp_size=2)
    tokens = np.array([1024.0])
    compute = costs.compute_s(tokens) * costs.calibration.tokens_factor(tokens)
    assert float((costs.tokens_s(tokens) - compute)[0]) == pytest.approx(2 * (50.0 + 0.1 * 1024) * 1e-6, rel=0.01)


def test_head_and_embedding_belong_to_the_ends() -> None:
    model = fitted().cost_model((8, 8))
    assert model.stages[0].final_s == 0.0
    assert model.stages[1].final_s == pytest.approx(400e-6)
    assert model.stages[0].tokens_s(1024) > model.stages[1].tokens_s(1024)


def test_hop_and_chunk_costs_are_fitted() -> None:
    model = fitted().cost_model((8, 8))
    assert model.hop_latency_s == pytest.approx(30e-6, rel=0.05)
    assert model.hop_token_s == pytest.approx(0.05e-6, rel=0.05)
    assert model.stages[0].round_overhead_s == pytest.approx(100e-6, rel=0.01)
    assert model.stages[0].chunk_s == pytest.approx(10e-6, rel=0.01)


def test_missing_rows_say_what_to_measure() -> None:
    rows = [row for row in measure(Machine()) if row.op != "attention"]
    with pytest.raises(UserError, match=r"no attention rows for llama-3\.2-1b.*isochunk profile"):
        fit_layer_costs(rows, WORK, busy_ranks=2)


def test_rows_of_the_nearest_load_are_used() -> None:
    quick, slow = Machine(), Machine(launch_us=1020.0)
    rows = measure(quick, busy_ranks=1) + measure(slow, busy_ranks=8)
    light, heavy = (fit_layer_costs(rows, WORK, busy_ranks=busy).cost_model((1,)) for busy in (2, 7))
    launches = 5  # four matmuls and attention
    added = heavy.stage_seconds(0, [(16, 0, False)]) - light.stage_seconds(0, [(16, 0, False)])
    assert added == pytest.approx(launches * 1000e-6, rel=0.02)


def test_a_load_of_few_points_is_passed_over() -> None:
    few = [row for row in measure(Machine(launch_us=1020.0), busy_ranks=1) if 16 in row.shape.values()]
    rows = few + measure(Machine(), busy_ranks=2)
    one, two = (fit_layer_costs(rows, WORK, busy_ranks=busy).cost_model((1,)) for busy in (1, 2))
    assert one.stage_seconds(0, [(1024, 0, False)]) == pytest.approx(two.stage_seconds(0, [(1024, 0, False)]))


def test_what_cannot_be_left_out_is_doubted() -> None:
    kept = (16, 256, 4096)  # too far apart to leave the middle out
    rows = [row for row in measure(Machine()) if row.op != "elementwise" or row.shape["tokens"] in kept]
    errors = {error.op: error for error in held_out_errors(rows, WORK, busy_ranks=2)}
    assert errors["elementwise"].num_points == 0 and errors["elementwise"].median == UNTESTED
    assert 0.0 < errors["elementwise"].of_layer < UNTESTED


def test_held_out_points_are_predicted_and_counted() -> None:
    errors = {error.op: error for error in held_out_errors(measure(Machine()), WORK, busy_ranks=2)}
    assert set(errors) == {"matmul", "elementwise", "attention"}
    gaps_of_four_at_most = sum(after <= 4 * before for before, after in zip(CHUNKS, CHUNKS[2:], strict=False))
    assert errors["matmul"].num_points == 4 * gaps_of_four_at_most
    assert errors["elementwise"].worst < 1e-9
    assert errors["attention"].median < 0.05


PIECES_OF_256 = ((64, 0), (64, 64), (64, 128), (64, 192))  # two ranks have two of them each


def test_a_plan_names_the_kernels_of_the_fit() -> None:
    sizes = {"heads": 8, "kv_heads": 8, "head_dim": 64}

    def row(kernel: str, chunk: int, us: float) -> Measurement:
        return Measurement(
            op="attention", dtype="float32", shape=sizes | {"chunk": chunk, "context": 0}, group_size=1, busy_ranks=2,
            variant=kernel, num_samples=3, median_us=us, p10_us=us, p90_us=us, min_us=us, std_us=0.0, noisy=False,
            measured_at=datetime.now(UTC), code_version="test",
        )  # fmt: skip

    rows = [
        row("cpu-folded", 64, 10.0), row("cpu-flash", 64, 8.0), row("sdpa", 64, 1.0),
        row("cpu-folded", 4096, 100.0), row("cpu-flash", 4096, 99.0), row("sdpa", 4096, 1.0),
    ]  # fmt: skip
    choose = kernel_choice(rows)
    chosen = {one.shape["chunk"]: one.variant for one in chosen_kernels(rows, choose)}
    assert chosen == {64: "cpu-flash", 4096: "cpu-folded"}
    assert all(choose(chunk, 0).value == kernel for chunk, kernel in chosen.items())
    cards = [row("cudnn-graph", 64, 10.0), row("sdpa", 64, 1.0)]
    assert [one.variant for one in chosen_kernels(cards, kernel_choice(cards))] == ["sdpa"]
    chunks = (Chunk(0, 0, 8192), Chunk(1, 0, 256))
    asked = tuple(Request(id=f"r{chunk.request}", prompt_tokens=chunk.tokens) for chunk in chunks)
    for parallel, pieces in (
        (Parallel(tp_size=1, pp_size=1, layer_partition=(4,)), ((256, 0),)),
        (Parallel(tp_size=1, pp_size=1, layer_partition=(4,), sp_size=2, sp_kind=SPKind.GATHER), PIECES_OF_256),
    ):
        plan = Plan(model={}, precision="float32", parallel=parallel, requests=asked, rounds=(chunks,))
        kernels = with_kernels(plan, choose).attention_kernels
        assert kernels == AttentionKernels(usual=AttentionKernel.CPU_FOLDED, others={AttentionKernel.CPU_FLASH: pieces})
