"""Python processes of our own. They import from where this one does, and from nowhere else: started
with -m or -c alone, Python looks into the current directory first, which may be a checkpoint's."""

from __future__ import annotations

import sys

SET_PATH = "import sys; sys.path[:] = sys.argv.pop(1).split(chr(10)); "
"""Begins a program, before it imports anything; its first argument is `path_argument`'s."""

_RUN = SET_PATH + "import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__')"


def path_argument() -> str:
    """This process's sys.path as one argument."""
    return "\n".join(entry for entry in sys.path if isinstance(entry, str))


def module_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module as python -m would, but for where modules come from."""
    return [sys.executable, "-c", _RUN, path_argument(), module, *arguments]
