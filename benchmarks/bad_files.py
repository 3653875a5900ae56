"""Bad files of every format that users hand over: good ones damaged, and documents made from the formats' schemas."""

from __future__ import annotations

import copy
import gzip
import json
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e-300, 1e308, 2**31, 2**40, 2**53, 2**63 - 1, -(2**63), 2**64, 10**400,
    float("nan"), float("inf"), -float("inf"), "", "0", "none", "nan", "\x1b[2J", "a\0b", "\ud800", "\u202e", "é" * 300,
    "x" * 5000, "../up", "/etc/passwd", [], {}, [[]], [{}], {"": {}}, [1, "a", None], {"a": [1, {"b": 2}]},
)  # fmt: skip
Content = Any


def damaged(content: Content, source: random.Random) -> Content:
    """The content with one to three of its values replaced, removed, doubled, renamed, or buried in lists."""
    content = copy.deepcopy(content)
    for _ in range(source.randint(1, 3)):
        places = list(_places(content))
        if not places:
            break
        parent, key = source.choice(places)
        action = source.randrange(7)
        if action <= 2:
            parent[key] = copy.deepcopy(source.choice(ODD))
        elif action == 3:
            del parent[key]
        elif action == 4 and isinstance(parent, list):
            parent.extend([copy.deepcopy(parent[key])] * source.choice((1, 3, 200)))
        elif action == 4:
            parent[source.choice(("x", "", "id", f"{key} "))] = parent.pop(key)
        elif action == 5:
            for _ in range(source.choice((1, 5, 70, 200))):
                parent[key] = [parent[key]]
        elif isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
            factor = source.choice((-1, 2, 1000, 10**6, 10**12, 0.5, 1e-9))
            with suppress(OverflowError):  # a whole number that no float can be
                parent[key] = parent[key] * factor
        else:
            parent[key] = str(parent[key])
    return content


def from_schema(schema: Mapping[str, Any], source: random.Random, *, depth: int = 0) -> Content:
    """A document as a JSON schema allows it; one value in twenty is odd."""

    def make(part: Mapping[str, Any], depth: int) -> Content:
        if source.random() < 0.05:
            return copy.deepcopy(source.choice(ODD))
        if "$ref" in part:
            return make(schema["$defs"][part["$ref"].rpartition("/")[2]], depth)
        if "anyOf" in part:
            return make(source.choice(part["anyOf"]), depth)
        if "enum" in part:
            return source.choice(part["enum"])
        match part.get("type"):
            case "object" if "properties" in part:
                needed = set(part.get("required", ()))
                named = part["properties"].items()
                return {name: make(one, depth + 1) for name, one in named if name in needed or source.random() < 0.7}
            case "object":
                values = part.get("additionalProperties")
                values = values if isinstance(values, Mapping) else {}
                return {source.choice("abckmnq"): make(values, depth + 1) for _ in range(source.randrange(4))}
            case "array":
                count = source.choice((0, 1, 1, 2, 3, 8))
                return [make(part.get("items", {}), depth + 1) for _ in range(count if depth < 6 else 0)]
            case "integer":
                return source.choice((0, 1, 2, 5, 64, 1000, 10**6, source.randrange(10**9)))
            case "number":
                return source.choice((0.0, 1.0, 1e-6, source.random(), source.random() * 1e6))
            case "string" if part.get("format") == "date-time":
                return source.choice(("2026-01-01T00:00:00+00:00", "2026-01-01T00:00:00Z", "2026-13-01", "0"))
            case "string":
                return source.choice(("r0", "a", "float32", "matmul", "none", "model.safetensors"))
            case "boolean":
                return source.random() < 0.5
        return copy.deepcopy(source.choice(ODD))

    return make(schema, depth)


def written(content: Content, source: random.Random) -> bytes:
    """The content as the bytes of a JSON file, in one case of three damaged as bytes too."""
    return _broken(json.dumps(content).encode(), source) if source.random() < 0.33 else json.dumps(content).encode()


def written_lines(lines: Sequence[Content], source: random.Random) -> bytes:
    """A document a line, in one case of three damaged as bytes too."""
    data = b"\n".join(json.dumps(line).encode() for line in lines)
    return _broken(data, source) if source.random() < 0.33 else data


def _places(content: Content) -> list[tuple[Any, Any]]:
    """Every (list or object, index or key) in the content."""
    if not isinstance(content, list | dict):
        return []
    keys = content.keys() if isinstance(content, dict) else range(len(content))
    return [(content, key) for key in keys] + [place for key in keys for place in _places(content[key])]


def _broken(data: bytes, source: random.Random) -> bytes:
    at = source.randrange(len(data) + 1)
    ways: tuple[Callable[[], bytes], ...] = (
        lambda: data[:at],
        lambda: data[at:],
        lambda: data[:at] + source.randbytes(source.choice((1, 3, 40))) + data[at:],
        lambda: data[:at] + bytes([data[at % len(data)] ^ 1 << source.randrange(8)]) + data[at + 1 :] if data else b"",
        lambda: data + data,
        lambda: b"\xef\xbb\xbf" + data,
        lambda: data.decode().encode("utf-16"),
        lambda: data.decode().encode("latin-1", "replace") + b"\xe9",
        lambda: gzip.compress(data, mtime=0)[: at + 20],
        lambda: data.replace(b'"', b"'"),
        lambda: data.replace(b'": ', b'": 1, "', 1),
        lambda: data.replace(b"{", b'{"id": 1, "id": 2, ', 1),
        lambda: b"[" * 5000 + data + b"]" * 5000,
        lambda: data.replace(b"0", b"9" * 5000, 1),
        lambda: b"",
    )
    return source.choice(ways)()
