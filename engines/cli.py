"""`tmpdiff-runtime`: prompt to picture from a bundle, without torch or diffusers.

`tmpdiff-export run` and `verify` are the same functions. Libraries are imported by the command that
needs them, so that `--help`, `--version` and a wrong argument answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from engines.errors import TmpDiffError
from engines.files import reason
from engines.run import add_run_arguments, run
from engines.terminal import print_json, printable
from engines.version import VERSION

PROGRAM = "tmpdiff-runtime"
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand.

    Returns:
        0, 1 when it failed (one line on stderr says why), or 130 after Ctrl-C; argparse leaves with 2
        on wrong usage.
    """
    args = _parser().parse_args(argv)
    return guarded(PROGRAM, lambda: int(args.function(args)))


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `verify`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def verify(args: argparse.Namespace) -> int:
    """Checks every file of a bundle against its hash, and the stored schedule.

    Returns:
        0.

    Raises:
        TmpDiffError: a file is missing, altered or does not belong here.
    """
    from engines.bundle import Bundle

    bundle = Bundle.open(args.bundle)
    checked = bundle.verify()
    if args.json:
        print_json({"bundle": str(args.bundle), "bundle_id": bundle.manifest.bundle_id, "files": checked})
    else:
        print(printable(f"bundle {args.bundle} is whole: {checked} files checked, id {bundle.manifest.bundle_id[:12]}"))
    return 0


def guarded(program: str, command: Callable[[], int]) -> int:
    """Runs a command and turns its failure into one line on stderr.

    Returns:
        What `command` returns; 1 when it failed, 130 when it was interrupted.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell; no file of ours may get its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (for as long as the process lives)
    for stream in (sys.stdout, sys.stderr):  # a path need not be printable in the terminal's encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with contextlib.suppress(ValueError):  # not in the main thread
            # A container that stops us, and a terminal that closes, as Ctrl-C; nohup has the latter ignored.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                signal.signal(signal.SIGHUP, signal.default_int_handler)
        status = command()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as stop:  # its argument is what a command says of what it leaves
        # A terminal signals a frozen program twice: by itself and through its boot loader.
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        left = stop.args[0] if stop.args else "nothing half-written is left"
        with contextlib.suppress(OSError):  # the terminal has closed
            print(f"{program}: interrupted; {left}", file=sys.stderr)
        return INTERRUPTED
    except MemoryError:
        message = "out of memory; fewer prompts at once need less"
    except ImportError as error:
        what = error.name or str(error).strip().partition("\n")[0]
        message = (
            f"module {what} cannot be imported; install the package with its dependencies, for building and calibrating those "
            "of its extra: pip install '.[export]'"
        )
    except (TmpDiffError, ValueError) as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {reason(error)}" if error.filename else reason(error)
        _drop_stdout()
    print(f"{program}: error: {printable(message)}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Runs a bundle of engines: prompt to picture.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, function, declare, text in (
        ("run", run, add_run_arguments, "prompt to picture"),
        ("verify", verify, add_verify_arguments, "check every file of a bundle against its hash"),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        declare(command)
        command.set_defaults(function=function)
    return parser


def _drop_stdout() -> None:
    """Points stdout at nothing if it is what failed, or Python would report it once more on its way out."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
