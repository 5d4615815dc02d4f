"""What the command lines have in common: help, errors that a user can mend, and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from autolora.errors import AutoLoRAError, ConfigError
from autolora.signals import Interrupted


def carry_out(work: Callable[[list[str]], int | None], argv: Sequence[str] | None, help_text: str) -> None:
    """Do what a command line asks for, or print its help.

    Args:
        work: takes the arguments, and gives an exit code if it is not 0.
        argv: arguments in place of ``sys.argv[1:]``.
        help_text: what ``-h`` and ``--help`` print.

    Raises:
        SystemExit: with the code of ``work``; 2 if the command line is wrong and 1 for any other error that the user
            can mend, with its lines on standard error; 130 after Ctrl-C, 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        print(help_text, end="")
        return
    try:
        code = work(arguments)
    except AutoLoRAError as error:
        print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        code = 2 if isinstance(error, ConfigError) else 1
    except Interrupted as stop:
        code = stop.exit_code
    except KeyboardInterrupt:
        code = 130
    if code:
        sys.exit(code)
