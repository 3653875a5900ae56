"""Published traces as they are published: a few lines in each format, read with what is said of them."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from db.errors import UserError
from tuner.workload.prefix_cache import PrefixCache
from tuner.workload.prompt_lens import parse_prompt_lens
from tuner.workload.trace_format import TimeUnit, TraceFormat
from tuner.workload.workload import NO_CACHE, Workload, as_lines, load_workload

MOONCAKE = "".join(
    f'{{"timestamp": {at}, "input_length": {length}, "output_length": {answer}, "hash_ids": {blocks}}}\n'
    for at, length, answer, blocks in (
        (0, 6758, 500, list(range(14))), (27482, 6955, 52, [0, 1, 2, *range(46, 57)]), (30535, 1536, 26, [0, 1, 2]),
    )
)  # fmt: skip
BAILIAN = (
    '{"chat_id": 159, "parent_chat_id": -1, "timestamp": 61.114, "input_length": 40, "output_length": 132, '
    '"type": "text", "turn": 1, "hash_ids": [7, 8, 9]}\n'
    '{"chat_id": 160, "parent_chat_id": 159, "timestamp": 75.5, "input_length": 60, "output_length": 9, '
    '"type": "text", "turn": 2, "hash_ids": [7, 8, 11, 12]}\n'
)
AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:00.017335+00:00,2399,6
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,0,230,230,Conversation log
118,GPT-4,417,0,417,API log
"""
BURSTGPT_SESSIONS = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
19440110.0,1722ac82,43,GPT-4,906,446,1352,Conversation log
19440161.0,d5983bf9,2,ChatGPT,36,29,65,Conversation log
"""


def read(folder: Path, text: str, **options: Any) -> Workload:
    path = folder / "trace"
    path.write_text(text)
    return load_workload(path, **options)


@pytest.mark.parametrize(
    ("text", "lengths", "arrivals_s", "answers", "note"),
    [
        (MOONCAKE, (6758, 6955, 1536), (0, 27.482, 30.535), (500, 52, 26), "as mooncake: 3 requests over 30.5"),
        (BAILIAN, (40, 60), (0, 14.386), (132, 9), "as bailian: 2 requests over 14.39 s, 0.139 a second (times in sec"),
        (AZURE_2023, (374, 396), (0, 4.314579), (44, 109), "as azure: 2 requests over 4.315 s"),
        (AZURE_2024, (2162, 2399), (0, 0.007405), (5, 6), "(times are dates)"),
        (BURSTGPT, (472, 417), (0, 113), (18, 0), "as burstgpt: 2 requests over 113 s"),
        (BURSTGPT_SESSIONS, (906, 36), (0, 51), (446, 29), "as burstgpt: 2 requests over 51 s"),
    ],
)
def test_published_traces_are_recognised(
    text: str,
    lengths: tuple[int, ...],
    arrivals_s: tuple[float, ...],
    answers: tuple[int, ...],
    note: str,
    tmp_path: Path,
) -> None:
    workload = read(tmp_path, text)
    assert tuple(request.prompt_tokens for request in workload.requests) == lengths
    assert [request.arrival_s for request in workload.requests] == pytest.approx(arrivals_s, abs=1e-5)
    assert workload.output_tokens == answers
    assert note in workload.notes[0]


def test_a_line_without_tokens_is_skipped_and_said(tmp_path: Path) -> None:
    note = read(tmp_path, BURSTGPT).notes[1]
    assert note == "Skipped 1 of 3 lines whose prompt has no tokens, the first in line 3."
    with pytest.raises(UserError, match="at least one request with an input_length above 0"):
        read(tmp_path, '{"input_length": 0}')


def test_prefix_hits_are_whole_blocks_of_the_format(tmp_path: Path) -> None:
    cached = [request.cached_tokens for request in read(tmp_path, MOONCAKE).requests]
    assert cached == [0, 3 * 512, 1535]  # a prompt runs at least its last token
    workload = read(tmp_path, BAILIAN)
    assert [request.cached_tokens for request in workload.requests] == [0, 32]
    assert workload.hit_rate == pytest.approx(0.32)
    assert workload.notes[-1] == "Prefix cache without limit, blocks of 16: 32.0% of all prompt tokens are hits."
    off = read(tmp_path, BAILIAN, cache_tokens=NO_CACHE)
    assert off.hit_rate == 0.0 and "No prefix cache" in off.notes[-1]
    assert read(tmp_path, MOONCAKE, cache_tokens=2 * 512).requests[1].cached_tokens == 2 * 512


def test_the_least_recently_used_blocks_leave() -> None:
    cache = PrefixCache(4 * 10, 10)
    assert [cache.hit_tokens(blocks, 100) for blocks in ([1, 2], [3, 4], [1, 2], [5, 6], [3, 4], [1, 2])] == [
        0, 0, 20, 0, 0, 0,
    ]  # fmt: skip
    assert PrefixCache(None, 10).hit_tokens([1], 5) == 0


def test_think_times_make_sessions(tmp_path: Path) -> None:
    turns = [
        {"session_id": "a", "input_length": 10}, {"session_id": "b", "timestamp": 500, "input_length": 20},
        {"session_id": "a", "delay": 2000, "input_length": 30}, {"session_id": "b", "delay": 100, "input_length": 40},
        {"session_id": "a", "delay": 1, "input_length": 50},
    ]  # fmt: skip
    workload = read(tmp_path, "\n".join(map(json.dumps, turns)))
    found = [(request.prompt_tokens, request.arrival_s) for request in workload.requests]
    assert found == [(10, 0.0), (20, 0.5), (40, 0.6), (30, 2.0), (50, pytest.approx(2.001))]
    assert workload.notes[1].startswith("3 turns of 2 sessions arrive their delay after the turn before arrived")
    alone = read(tmp_path, "\n".join(json.dumps({"delay": 1000, "input_length": 5}) for _ in range(3)))
    assert [request.arrival_s for request in alone.requests] == [1.0 - 1.0, 1.0, 2.0]
    assert "(delays in milliseconds, as mooncake traces count)" in alone.notes[0]
    assert alone.notes[1].startswith("3 turns of one session, as no line names any, arrive")


def test_times_that_go_back_are_sorted_and_said(tmp_path: Path) -> None:
    lines = [{"input_length": 5 + i, "timestamp": at} for i, at in enumerate((0, 40, 30, 50, 20))]
    workload = read(tmp_path, "\n".join(map(json.dumps, lines)))
    assert [request.prompt_tokens for request in workload.requests] == [5, 9, 7, 6, 8]
    assert workload.notes[1] == "Sorted by time: 2 lines came before the line above."


def test_a_trace_may_be_gzipped(tmp_path: Path) -> None:
    for text in (MOONCAKE, AZURE_2024):
        (tmp_path / "packed").write_bytes(gzip.compress(text.encode()))
        assert load_workload(tmp_path / "packed").requests == read(tmp_path, text).requests


def test_a_hundred_million_blank_lines_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "packed").write_bytes(gzip.compress(b"\n" * (20 << 20), compresslevel=1))
    with pytest.raises(UserError, match="must have at most 1000000 lines, blank ones included"):
        load_workload(tmp_path / "packed")


def test_each_request_has_its_own_name(tmp_path: Path) -> None:
    chats = BAILIAN.replace("160", "159")
    assert [request.id for request in read(tmp_path, BAILIAN).requests] == ["159", "160"]
    assert [request.id for request in read(tmp_path, chats).requests] == ["r0", "r1"]
    with pytest.raises(UserError, match="line 2: id: a; each request needs its own, and line 1 has this one"):
        read(tmp_path, '{"id": "a", "input_length": 1}\n{"id": "a", "input_length": 1}\n')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (MOONCAKE.encode("utf-16"), "must be UTF-8 text, gzipped or plain (byte 0 is not)"),
        (b"TIMESTAMP;ContextTokens;GeneratedTokens\n", "JSON lines, an object each, or CSV with the columns"),
        (b'[{"input_length": 5}]', "JSON lines, an object each, or CSV"),
        (b'{\n "input_length": 5}', "line 1: {; JSON lines, an object each, or CSV"),
        (b'{"input_length": "5"}', 'line 1: input_length: "5"; a whole number is needed'),
        (b'{"input_length": 5, "hash_ids": [1, 2.5]}', "line 1: hash_ids[1]: 2.5; a whole number is needed"),
    ],
)
def test_files_of_another_kind_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "trace").write_bytes(content)
    with pytest.raises(UserError) as refused:
        load_workload(tmp_path / "trace")
    assert message in str(refused.value) and str(refused.value).isprintable()


def test_a_pipe_cannot_be_a_trace(tmp_path: Path) -> None:
    readable, writable = os.pipe()
    os.write(writable, MOONCAKE.encode())
    os.close(writable)
    with pytest.raises(UserError, match="must be a file, for it is read twice"):
        load_workload(f"/dev/fd/{readable}")
    os.close(readable)


def test_units_are_told_from_the_rate_or_asked_for(tmp_path: Path) -> None:
    plain = [{"input_length": 5, "timestamp": 0.25 * i} for i in range(20)]
    workload = read(tmp_path, "\n".join(map(json.dumps, plain)))
    assert workload.requests[-1].arrival_s == pytest.approx(4.75)
    assert "in seconds: they have fractions, and in ms 4e+03 would come a second" in workload.notes[0]
    whole = "\n".join(json.dumps({"input_length": 5, "timestamp": i // 4}) for i in range(40))
    with pytest.raises(UserError, match=r"every 0\.000231 s in milliseconds.*--time-unit s or --time-unit ms"):
        read(tmp_path, whole)
    assert read(tmp_path, whole, unit=TimeUnit.SECONDS).requests[-1].arrival_s == 9.0
    assert read(tmp_path, whole, unit=TimeUnit.MILLISECONDS).requests[-1].arrival_s == pytest.approx(0.009)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time,tokens\n1,2\n", "line 1: time,tokens; names no columns of azure or burstgpt; say which it is with"),
        (AZURE_2023 + "yesterday,1,2\n", "line 4: TIMESTAMP: yesterday; a date such as"),
        (AZURE_2023 + "2023-11-16 18:15:46,1\n", "line 4: 2 fields; 3 are needed"),
        (AZURE_2023 + "2023-11-16 18:15:46,-1,2\n", "line 4: ContextTokens: -1; must be a whole number"),
        (BURSTGPT.replace("472", "4e2"), "line 2: Request tokens: 4e2; must be a whole number"),
        (BURSTGPT.replace("118", "nan"), "line 4: Timestamp: nan; a number of seconds is needed"),
        (
            BURSTGPT.replace("Response tokens", "Responses"),
            "line 2: Response tokens: missing; the first line must name",
        ),
        (AZURE_2023.splitlines()[0], "must have at least one request"),
    ],
)
def test_bad_tables_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        read(tmp_path, text)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_format_can_be_said_and_a_trace_written_again(tmp_path: Path) -> None:
    workload = read(tmp_path, MOONCAKE, format=TraceFormat.BAILIAN, cache_tokens=NO_CACHE)
    assert workload.requests[1].arrival_s == 27482
    lines = as_lines(read(tmp_path, MOONCAKE).requests)
    again = read(
        tmp_path,
        "\n".join(json.dumps({name: getattr(line, name) for name in line.__slots__}) for line in lines),
    )
    assert [request.cached_tokens for request in again.requests] == [0, 1536, 1535]
    assert [request.arrival_s for request in again.requests] == pytest.approx([0.0, 27.482, 30.535])


def test_prompt_lengths_repeat_and_have_cached_prefixes() -> None:
    requests = parse_prompt_lens("8192*2, 4096@2048,100@0*2")
    assert [(r.id, r.prompt_tokens, r.cached_tokens) for r in requests] == [
        ("r0", 8192, 0), ("r1", 8192, 0), ("r2", 4096, 2048), ("r3", 100, 0), ("r4", 100, 0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8*0", "--prompt-lens 8*0: 0; must be from 1"),
        ("8*x", "--prompt-lens 8*x: x; must be a whole number"),
        ("8@8", "--prompt-lens 8@8: 8; must be from 0 to 7"),
        ("8*70000", "--prompt-lens 8*70000: 70000; must be from 1 to 65536"),
        ("8*40000,9*40000", "--prompt-lens: 9*40000; at most 65536 prompts in all"),
        ("8,", "--prompt-lens: must be a whole number"),
    ],
)
def test_bad_prompt_lengths_are_named(text: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_prompt_lens(text)
    assert message in str(refused.value)
