"""The commands, their arguments and their exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

from jsonargparse import ArgumentParser

from groundwire.cli.plugins import plugins
from groundwire.cli.report import report
from groundwire.cli.show import show
from groundwire.cli.terminal import CommandError, clean

COMMANDS: dict[str, Callable[..., int]] = {"plugins": plugins, "report": report, "show": show}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; those of the process when None.

    Returns:
        0, or 1 if ``plugins --check`` found one that fails, or 2 for an error, which is one line on stderr.

    Raises:
        SystemExit: After ``--help`` and ``--version``, and with 2 for arguments that cannot be understood.

    Example:
        >>> main(["report", "no/such/run"])
        2
    """
    config = _parser().parse_args(argv)
    try:
        return COMMANDS[config.subcommand](**config[config.subcommand].as_dict())
    except CommandError as error:
        print(f"groundwire: {clean(str(error))}", file=sys.stderr)
        return 2


def _parser() -> ArgumentParser:
    parser = ArgumentParser("groundwire", description="Look at plugins, reports, checkpoints.", version=_version())
    subcommands = parser.add_subcommands()
    for name, command in COMMANDS.items():
        sub = ArgumentParser(description=(command.__doc__ or "").partition("\n")[0])
        sub.add_function_arguments(command, as_positional=True, skip={"check"})
        if name == "plugins":  # a switch; made from the signature it would need a "true" after it
            sub.add_argument("--check", action="store_true", help="Import each one too, and end with 1 if one fails.")
        subcommands.add_subcommand(name, sub, help=sub.description)
    return parser


def _version() -> str:
    try:
        return version("groundwire")
    except PackageNotFoundError:
        return "unknown (not installed)"
