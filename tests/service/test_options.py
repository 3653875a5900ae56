"""Options declared as fields: what click and Python make of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import click
import pytest
from click.testing import CliRunner

from db.errors import UserError
from service.cli.options import options_of
from service.use_cases.options import check_options, db_url
from service.use_cases.options import option as described


class Kind(StrEnum):
    """Offered by its values; click would take the names."""

    ONE = "a"
    OTHER = "b"


@dataclass(frozen=True, slots=True, kw_only=True)
class Some:
    place: str | None = described(None, "Where.", flags=("PLACE",))
    num_ranks: int | None = described(None, "Ranks.", above=0)
    budget_s: float = described(1.5, "Seconds.", flags=("-b", "--budget-s"), above=0)
    kind: str = described("a", "Which.", choices=tuple(Kind))
    loud: bool = described(False, "Say more.")
    careful: bool = described(True, "Take care.")
    database: str | None = db_url()

    def __post_init__(self) -> None:
        check_options(self)


@click.command()
@options_of(Some)
@click.option("--json", "as_json", is_flag=True)
def command(options: Some, as_json: bool) -> None:
    """What it does."""
    click.echo(f"{options} {as_json}")


def called(*arguments: str) -> str:
    return CliRunner().invoke(command, arguments, standalone_mode=False, catch_exceptions=False).stdout.strip()


def test_defaults_are_those_of_the_class() -> None:
    assert called() == f"{Some()} False"


def test_every_kind_of_option_is_read() -> None:
    arguments = ("here", "--num-ranks", "3", "-b", "2", "--kind", "b", "--loud", "--no-careful", "--json", "--db", "u")
    expected = Some(place="here", num_ranks=3, budget_s=2.0, kind="b", loud=True, careful=False, database="u")
    assert called(*arguments) == f"{expected} True"


def test_an_option_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOCHUNK_DB", "sqlite:///there.db")
    assert called() == f"{Some(database='sqlite:///there.db')} False"


def test_help_says_what_fields_say() -> None:
    text = CliRunner().invoke(command, ["--help"]).stdout
    for words in ("[PLACE]", "--num-ranks INTEGER", "Ranks.", "-b, --budget-s FLOAT", "[default: 1.5]", "[a|b]",
                  "--careful / --no-careful", "--loud", "What it does."):  # fmt: skip
        assert words in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_ranks": 0}, "--num-ranks: 0; must be more than 0"),
        ({"budget_s": float("nan")}, "--budget-s: nan; must be more than 0"),
        ({"kind": "c"}, "--kind: c; must be one of a, b"),
    ],
)
def test_values_are_checked_wherever_they_come_from(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as refused:
        Some(**values)  # type: ignore[arg-type]  # wrong on purpose
    assert str(refused.value) == message
