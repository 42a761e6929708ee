"""The command `hookctl`: demos, runs of a stack, and what there is to see in a model.

Exit status: 0 fine, 1 failure, 2 bad input, 130 interrupted. Results go to standard output,
progress and errors to standard error.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

import hookctl
from hookctl.cli import app, batch, bench, demo, inspect, maps, run
from hookctl.cli.common import Formatter
from hookctl.errors import HookctlError, InputError

_EXAMPLES = """
examples:
  hookctl demo                                # edit images of the embedded pipeline, measured
  hookctl run recolour                        # a stack that comes with hookctl
  hookctl maps shapes --prompt "a red circle above a blue square"
  hookctl inspect stabilityai/stable-diffusion-2-1

"shapes" is the embedded pipeline: no download, seconds on a CPU; "shapes-flow" its sibling, flow
matching with joint attention.
`hookctl COMMAND --help` has more examples.
"""

# A full disk: these come while a file is written, and do not say which.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What was typed is no path that could be used.
_UNUSABLE = (
    errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.EROFS,
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        print(f"hookctl: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Also a command's own parser refuses what it does not know, and says what is near."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = get_close_matches(unknown[0], self._option_string_actions, n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return known, unknown


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="hookctl",
        description="Attention control for diffusion models.",
        epilog=_EXAMPLES,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"hookctl {hookctl.__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for module in (demo, run, inspect, maps, app, batch, bench):
        module.add(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    trace, options = bool(os.environ.get("HOOKCTL_TRACE")), None
    try:
        options = parser().parse_args(arguments)
        options.main(options)
        sys.stdout.flush()
        return 0
    except SystemExit as done:  # argparse: help, version, or an error that it has printed
        return done.code if isinstance(done.code, int) else 2
    except KeyboardInterrupt:
        print("hookctl: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `hookctl inspect shapes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (InputError, FileNotFoundError, NotADirectoryError, FileExistsError) as error:
        return _fail(error, str(error), 2, trace)
    except HookctlError as error:
        return _fail(error, str(error), 1, trace)
    except OSError as error:
        name = error.filename
        if name is None and error.errno in _FULL:
            name = f"--out {getattr(options, 'out', None) or 'out'}"
        reason = f"{name}: {error.strerror}" if name else str(error)
        return _fail(error, reason, 2 if error.errno in _FULL + _UNUSABLE else 1, trace)
    except Exception as error:
        hint = "" if trace else " (HOOKCTL_TRACE=1 shows where)"
        return _fail(error, f"{type(error).__name__}: {error}{hint}", 1, trace)


def _fail(error: Exception, message: str, status: int, trace: bool) -> int:
    if trace:
        traceback.print_exception(error)
    print(f"hookctl: error: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
