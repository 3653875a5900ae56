"""`isochunk completion`: lets a shell complete commands and options."""

from __future__ import annotations

import os
from pathlib import Path

import click

from db.errors import UserError
from db.files.replacement import check_writable, replace_file

PLACES = {
    "bash": "~/.local/share/bash-completion/completions/isochunk",
    "zsh": "~/.zfunc/_isochunk",
    "fish": "~/.config/fish/completions/isochunk.fish",
}
"""Where each shell looks for a command's completion."""
NOTES = {"zsh": "Have this in ~/.zshrc: fpath+=~/.zfunc; autoload -Uz compinit && compinit"}


@click.command(name="completion")
@click.argument("shell", type=click.Choice(list(PLACES)), required=False)
@click.option("--print", "print_only", is_flag=True, help="Print the script, write nothing.")
@click.pass_context
def command(context: click.Context, shell: str | None, print_only: bool) -> None:
    """Install completion of commands and options for SHELL: bash, zsh or fish. [default: the one of $SHELL]"""
    from click.shell_completion import get_completion_class

    name = shell or Path(os.environ.get("SHELL", "")).name
    kind = get_completion_class(name) if name in PLACES else None
    if kind is None:
        raise UserError("SHELL", name or "missing", f"must be one of {', '.join(PLACES)}")
    root = context.find_root()
    try:
        script = kind(root.command, {}, "isochunk", "_ISOCHUNK_COMPLETE").source()
    except RuntimeError as error:  # a bash that is too old
        raise UserError("SHELL", name, str(error)) from None
    if print_only:
        click.echo(script)
        return
    path = Path(PLACES[name]).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    check_writable("SHELL", path)
    replace_file(path, script.encode())
    click.echo(f"Wrote {path}; it works in the next shell.")
    if name in NOTES:
        click.echo(NOTES[name])
