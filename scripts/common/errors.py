"""What goes wrong for a cause that the user can cure: told in words, without a traceback."""

import difflib
import errno
import io
import sys
from collections.abc import Callable, Iterable


class ScriptError(Exception):
    """Something the user can cure. The message names the value and the cure; no traceback is shown for it."""


def run_script(main: Callable[[], int | None]):
    """Run a program's main function; turn a `ScriptError` into one line on stderr and exit status 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no ± or ’ shows ? in its place
    try:
        sys.exit(main() or 0)
    except ScriptError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(f"error: no space is left on the device of {error.filename}; free some and resume")
    except KeyboardInterrupt:
        sys.exit(130)


def closest(name: str, known: Iterable[str]) -> str:
    """A hint "; did you mean 'x'?" for a misspelt name, empty where nothing is near."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
