"""What commands print of texts that come from files."""

from __future__ import annotations

import pytest

from service.cli.output import print_json, print_table


def test_a_terminal_is_not_told_what_to_do_by_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("id",), [["\x1b[2Jgone\x07"], ["a\u202eb"]], title="of \x1b]0;title\x07")
    printed = capsys.readouterr().out
    assert all(line.isprintable() for line in printed.splitlines())
    assert "\\x1b[2Jgone\\x07" in printed
    print_json({"id": "\x1b[2J"})
    assert "\x1b" not in capsys.readouterr().out
