"""Plans as engines take them: files that can be read, flags that say the layout, and honest costs."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner

from db.errors import UserError
from service.cli.commands.export import ENGINES
from service.cli.main import cli
from service.engines.export import Engine, Export, export, export_json
from service.engines.rules import ChunkTable
from service.engines.sglang_plugin import SIZER, VARIABLE, register
from tests.tuner.atom import atom
from tuner.plan.plan import Chunk, Parallel, Plan, Request, save_plan
from tuner.rounds.round_plan import rounds_to_plan
from tuner.search.planner import plan_rounds


@pytest.fixture(scope="module")
def plan() -> Plan:
    cost = atom(4)
    requests = (Request(id="a", prompt_tokens=65536), Request(id="b", prompt_tokens=4096))
    return rounds_to_plan(
        plan_rounds(cost, requests),
        requests=requests,
        model={"name": "some"},
        precision="bfloat16",
        parallel=Parallel(tp_size=2, pp_size=4, layer_partition=(9, 8, 8, 7)),
        window=None,
        cost_model=cost.to_json(),
    )


@pytest.mark.parametrize("engine", Engine)
def test_every_engine_gets_files_and_is_judged_by_the_plans_own_costs(plan: Plan, engine: Engine) -> None:
    made = export(plan, engine)
    assert Plan.from_json(json.loads(made.files["plan.json"])) == plan
    assert made.plan_makespan_s == pytest.approx(plan.predicted and plan.predicted.makespan_s)
    assert made.cannot
    for one in made.ruled:
        assert one.makespan_s >= made.plan_makespan_s * (1 - 1e-9)
    assert json.loads(json.dumps(export_json(made)))["engine"] == engine


def test_commands_and_engines_are_named_alike() -> None:
    assert tuple(Engine) == ENGINES


def test_sglang_is_told_layout_partition_and_chunks(plan: Plan) -> None:
    made = export(plan, Engine.SGLANG)
    table = ChunkTable.of(plan)
    assert {"--tp-size=2", "--pp-size=4", f"--chunked-prefill-size={table.first}", "--enable-dynamic-chunking"} <= set(
        made.flags
    )
    assert made.environment["SGLANG_PP_LAYER_PARTITION"] == "9,8,8,7"
    planned, own = made.ruled
    assert planned.makespan_s <= own.makespan_s  # the plan's chunks are worth the plug-in


def test_the_others_get_what_they_can_be_told(plan: Plan) -> None:
    vllm = export(plan, Engine.VLLM)
    assert vllm.environment == {"VLLM_PP_LAYER_PARTITION": "9,8,8,7", "ISOCHUNK_PLAN": "plan.json"}
    planned, own = vllm.ruled
    assert f"--max-num-batched-tokens={planned.chunk + 2}" in vllm.flags
    assert planned.makespan_s == pytest.approx(vllm.plan_makespan_s)
    assert planned.makespan_s <= own.makespan_s
    ascend = export(plan, Engine.VLLM_ASCEND)
    (config,) = [flag for flag in ascend.flags if flag.startswith("--additional-config=")]
    assert json.loads(config.partition("=")[2])["scheduler_config"]["profiling_chunk_config"]["enabled"] is True
    trtllm = export(plan, Engine.TRTLLM)
    assert "pipeline_parallel_size: 4" in trtllm.files["config.yaml"].splitlines()
    assert any("9-8-8-7" in sentence for sentence in trtllm.cannot)
    graph = json.loads(export(plan, Engine.DYNAMO).files["graph.yaml"])
    (component,) = graph["spec"]["components"]
    (container,) = component["podTemplate"]["spec"]["containers"]
    assert graph["kind"] == "DynamoGraphDeployment"
    assert "--pp-size=4" in container["args"]


def test_a_plan_without_a_model_names_no_layers(plan: Plan) -> None:
    from dataclasses import replace

    made = export(replace(plan, model={}), Engine.SGLANG)
    assert "SGLANG_PP_LAYER_PARTITION" not in made.environment
    assert any("names no model" in sentence for sentence in made.cannot)


def test_a_plan_that_nothing_judges_is_refused(plan: Plan) -> None:
    from dataclasses import replace

    with pytest.raises(UserError, match="without a cost model"):
        export(replace(plan, cost_model=None), Engine.SGLANG)


def words_of(made: Export, folder: Path) -> list[str]:
    """What the launch script runs: its words, with a stand-in for the program."""
    program = made.files["launch.sh"].split("exec ")[1].split()[0]
    stand_in = folder / "bin" / program
    stand_in.parent.mkdir(exist_ok=True)
    stand_in.write_text(
        '#!/bin/sh\nfor word in "$@"; do echo "$word"; done\nenv | grep -E "^(SGLANG|VLLM|ISOCHUNK)" || true\n'
    )
    stand_in.chmod(0o755)
    environment = {"PATH": f"{stand_in.parent}:/usr/bin:/bin", "MODEL": "my model; rm -rf /"}
    done = subprocess.run(
        [str(folder / "launch.sh"), "--port", "1"],
        capture_output=True,
        text=True,
        timeout=20,
        env=environment,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("engine", ["sglang", "vllm", "vllm-ascend", "trtllm"])
def test_the_script_launches_with_the_flags_and_the_model_in_one_word(plan: Plan, engine: str, tmp_path: Path) -> None:
    save_plan(tmp_path / "plan.json", plan)
    out = tmp_path / "launch files"
    arguments = ["export", str(tmp_path / "plan.json"), "--engine", engine, "-o", str(out)]
    done = CliRunner().invoke(cli, arguments, standalone_mode=False, catch_exceptions=False)
    assert "by prediction" in done.stdout
    made = export(plan, Engine(engine))
    words = words_of(made, out)
    assert "my model; rm -rf /" in words
    assert set(made.flags) <= set(words)
    assert words[words.index("--port") + 1] == "1"
    if engine == "sglang":
        assert f"ISOCHUNK_PLAN={out}/plan.json" in words


def test_the_table_of_chunks_tells_each_context_its_size() -> None:
    chunks = [(0, 1024), (1024, 768), (1792, 512), (2304, 100)]
    plan = Plan(
        model={},
        precision="bfloat16",
        parallel=Parallel(tp_size=1, pp_size=1, layer_partition=(1,)),
        requests=(Request(id="a", prompt_tokens=2404),),
        rounds=tuple((Chunk(0, start, tokens),) for start, tokens in chunks),
    )
    table = ChunkTable.of(plan)
    assert [table.size(context) for context in (0, 1023, 1024, 1791, 1792, 9999)] == [1024, 1024, 768, 768, 512, 512]


class Registry:
    """Stands for SGLang's: keeps what is registered."""

    hooks: ClassVar[dict[str, Any]] = {}

    @classmethod
    def register(cls, target: str, hook: Any, hook_type: Any) -> None:
        cls.hooks[target] = (hook, hook_type)


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """SGLang's registry of hooks, empty."""
    module: Any = types.ModuleType("sglang.srt.plugins.hook_registry")
    module.HookRegistry = Registry
    module.HookType = types.SimpleNamespace(REPLACE="replace")
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    Registry.hooks = {}
    yield Registry.hooks


def test_the_plug_in_gives_sglang_the_plans_chunks(
    plan: Plan, tmp_path: Path, sglang: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    register()
    assert sglang == {}  # without a plan SGLang stays as it is
    save_plan(tmp_path / "plan.json", plan)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "plan.json"))
    register()
    predict, kind = sglang[f"{SIZER}.predict"]
    assert kind == "replace"
    assert sglang[f"{SIZER}.profile_and_fit"][0](object()) is True
    sizer = types.SimpleNamespace(page_size=64, max_prefill_tokens=1 << 20)
    planned = [chunk for chunks in plan.rounds for chunk in chunks if chunk.request == 0]
    assert [predict(sizer, chunk.start) for chunk in planned[:-1]] == [
        chunk.tokens // 64 * 64 for chunk in planned[:-1]
    ]
    sizer.max_prefill_tokens = 100
    assert predict(sizer, 0) == 64
