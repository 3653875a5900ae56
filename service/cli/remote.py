"""`isochunk --server URL COMMAND`: the same commands and options, run by a service."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from db.errors import UserError, cut, printable
from service.cli.output import print_json, show_pairs, show_table, wrapped
from service.http.client import Client
from service.use_cases.listing import Kept

WORKLOAD_OPTIONS = ("workload", "workload_format", "time_unit", "num_requests", "prefix_cache", "rate")
_MOST_TEXT_BYTES = 8 << 20
COMMANDS = ("profile", "tune", "run-plan", "quantize", "export", "models", "db")
_PATHS = {
    Kept.HARDWARE: "hardware",
    Kept.MEASUREMENTS: "measurements",
    Kept.PLANS: "plans",
    Kept.RUNS: "runs",
    Kept.FITS: "fits",
}


def remote(name: str, command: click.Command, server: str) -> click.Command:
    """Run a command through the service. Raises UserError for one that it does not support."""
    if name not in COMMANDS:
        raise UserError("--server", name, f"carries out {', '.join(COMMANDS)}")
    client = Client.at(server)
    if isinstance(command, click.Group):
        group = click.Group(name, help=command.help)
        group.add_command(_copy(command.commands["list"], functools.partial(_list, client)), "list")
        return group
    calls: dict[str, Callable[..., None]] = {
        "tune": _tune,
        "export": functools.partial(_export, command),
        "models": _models,
    }
    return _copy(command, functools.partial(calls.get(name, functools.partial(_job, name)), client))


def _copy(command: click.Command, callback: Any) -> click.Command:
    return click.Command(command.name, params=command.params, help=command.help, callback=callback)


def _tune(client: Client, *, as_json: bool, **_all: Any) -> None:
    given = _given()
    output = given.pop("output", None)
    if given.get("measure") is not None:
        _job("tune", client, as_json=as_json)
        return
    from db.files.documents import read_json, write_json

    if "cost_model" in given:
        given["cost_model"] = read_json(given["cost_model"], field="cost model")
    if "workload" in given:
        from dataclasses import asdict

        from service.use_cases.tune import workload_of
        from service.use_cases.tune_options import TuneOptions
        from tuner.workload.workload import as_lines

        asked = {name: given.pop(name) for name in WORKLOAD_OPTIONS if name in given}
        workload = workload_of(TuneOptions(model="read here", **asked))
        for note in workload.notes:
            click.echo(note, err=True)
        given["requests"] = [asdict(line) for line in as_lines(workload.requests)]
    made = client.post("plans", given)
    report = made["report"]
    if output is not None:
        write_json(output, report["plan"])
    if as_json:
        print_json(report | {"plan_id": made["plan_id"], "output": output})
        return
    _print(report)
    click.echo(f"Kept as plan {made['plan_id']} of {client.url}" if made["plan_id"] else f"Planned by {client.url}")
    if output is not None:
        click.echo(f"Wrote {output}")


def _print(report: Mapping[str, Any]) -> None:
    recommended = report["recommendation"]
    if recommended["warning"]:
        click.echo(f"{wrapped(printable(recommended['warning']))}\n")
    show_pairs([(str(word), str(words)) for word, words in recommended["words"].items()], title="Recommended")
    if report["layouts"]:
        columns = ("layout", "makespan s", "mean TTFT s", "rounds", "bubble %", "note", "layers")
        show_table(columns, [_layout_row(one) for one in report["layouts"]], title="Layouts, the best first")
    rivals = report["policies"] or report["replays"]
    rows = [
        (one["policy"], one["num_rounds"], one["makespan_s"], one["mean_ttft_s"], one["p90_ttft_s"]) for one in rivals
    ]
    show_table(("policy", "rounds", "makespan s", "mean TTFT s", "p90 TTFT s"), rows, title="Policies")
    predicted = report["plan"]["predicted"]
    click.echo(f"The plan, {report['plan']['policy']}: {predicted['makespan_s']:.4g} s")


def _layout(one: Mapping[str, Any]) -> str:
    """The layout by its short name."""
    from profiler.model.experts import Dispatch
    from profiler.sequence.kind import SPKind
    from tuner.plan.layout import Layout
    from tuner.plan.plan import Weights
    from tuner.plan.stage_order import StageOrder

    return str(
        Layout(
            tp_size=one["tp_size"], pp_size=one["pp_size"], sp_size=one["sp_size"], sp_kind=SPKind(one["sp_kind"]),
            virtual_stages=one["virtual_stages"], stage_order=StageOrder(one["stage_order"]),
            weights=Weights(one["weights"]), ep_size=one.get("ep_size", 1),
            dispatch=Dispatch(one.get("dispatch", "none")),
        )
    )  # fmt: skip


def _layout_row(one: Mapping[str, Any]) -> tuple[object, ...]:
    share = one.get("bubble_share")
    return (
        _layout(one), one.get("makespan_s"), one.get("mean_ttft_s"), one.get("num_rounds"),
        None if share is None else 100 * share, cut(one["refusal"] or "", 40),
        "-".join(map(str, one["layer_partition"])) or None,
    )  # fmt: skip


def _job(kind: str, client: Client, *, as_json: bool, **_all: Any) -> None:
    """Queue a job, print its output, and exit with its exit code."""
    given = _given()
    body: dict[str, Any] = {"kind": kind}
    if "plan" in given:
        body["plan_id"] = _plan_id(given.pop("plan"))
    if "weights" in given:
        body["weights"] = str(given.pop("weights"))
    if "model" in given:
        body["model"] = given.pop("model")
    if kind == "quantize":
        body["output"] = given.pop("output", None)
    for name in ("calibration", "held_out"):
        if name in given:
            body[name] = _text(name, given.pop(name))
    job = client.post("jobs", body | {"options": given})
    click.echo(f"job {job['id']} waits for {job['hardware']}", err=True)
    for line in client.follow(job["id"]):
        click.echo(line, err=True)
    done = client.get(f"jobs/{job['id']}")
    if done["status"] != "done":
        raise click.ClickException(f"job {done['status']}: {done['error']}")
    if as_json:
        print_json(done["result"])
    else:
        click.echo(f"job {job['id']}: done by {done['worker']}")


def _export(command: click.Command, client: Client, *, plan: Path, **given: Any) -> None:
    """Read a plan that is kept there, and write the engine's files here."""
    from db.files.documents import write_json

    content = client.get(f"plans/{_plan_id(plan)}/file")
    with tempfile.TemporaryDirectory(prefix="isochunk-") as folder:
        path = Path(folder) / "plan.json"
        write_json(path, content)
        assert command.callback is not None
        command.callback(plan=path, **given)


def _models(client: Client, *, model: str | None, as_json: bool) -> None:
    """Models that may be named there."""
    found = client.get("models")
    rows = [one for one in found if model in (None, one["name"])]
    if not rows:
        raise UserError("model", model, f"must be one of {', '.join(one['name'] for one in found)}")
    if as_json:
        print_json(rows)
        return
    columns = ("name", "num_layers", "hidden_size", "max_positions", "dtype")
    show_table(columns, [[row[name] for name in columns] for row in rows], title=f"models at {client.url}")


def _text(name: str, path: str) -> str:
    """What a text file holds."""
    from db.files.documents import read_utf8

    return read_utf8(Path(path), field=name, max_bytes=_MOST_TEXT_BYTES)


def _plan_id(path: Path) -> int:
    """Plans are named by their ids there."""
    text = str(path)
    if not (text.isascii() and text.isdigit()):
        raise UserError(
            "PLAN", path, "must be the id of a plan that the service keeps (isochunk --server URL db list plans)"
        )
    return int(text)


def _list(client: Client, *, what: str, hardware_id: int | None, limit: int, as_json: bool, **_all: Any) -> None:
    kept = Kept(what)
    if kept not in _PATHS:
        raise UserError("WHAT", what, f"must be one of {', '.join(_PATHS)} at a service")
    found = client.items(_PATHS[kept], limit, **({} if kept is Kept.HARDWARE else {"hardware": hardware_id}))
    rows = [_flat(row) for row in found if kept is not Kept.HARDWARE or hardware_id in (None, row["id"])]
    if as_json:
        print_json(rows)
    elif rows:
        columns = [name for name in kept.columns if name in rows[0]]
        show_table(columns, [[row.get(name) for name in columns] for row in rows], title=f"{kept} at {client.url}")
    else:
        click.echo(f"no {kept} at {client.url}")


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row with columns of its hardware, measurement or plan beside its own columns."""
    inner = [row.get(name) for name in ("hardware", "measurement", "summary")]
    flat = {**row, **{key: value for part in inner if isinstance(part, dict) for key, value in part.items()}}
    if isinstance(flat.get("shape"), dict):
        flat["shape_text"] = ",".join(f"{name}={size}" for name, size in sorted(flat["shape"].items()))
    if "memory_bytes" in flat:
        flat["memory_gib"] = round(flat["memory_bytes"] / 2**30, 1)
    return flat


def _given() -> dict[str, Any]:
    """What the user said; what is left out is the service's own default."""
    context = click.get_current_context()
    left_out = {"as_json", "db_url"}
    given = {
        name: value
        for name, value in context.params.items()
        if name not in left_out
        and context.get_parameter_source(name) is not ParameterSource.DEFAULT
        and value is not None
    }
    for name in ("check", "trace"):
        if name in given:
            raise UserError(f"--{name}", given[name], "is for runs on this machine")
    return given
