"""`tmpdiff-runtime`: prompt to picture from a bundle, without torch or diffusers.

`tmpdiff-export run` and `verify` are the same functions. Libraries are imported by the command that
needs them, so that `--help`, `--version` and a wrong argument answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from engines.arguments import (
    parse_guidance_scale,
    parse_prompt,
    parse_resident_engines,
    parse_seed,
    parse_threads,
)
from engines.errors import TmpDiffError
from engines.files import reason, require_writable
from engines.pictures import PNG, output_paths, write_pictures
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


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `run`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder")
    parser.add_argument(
        "--prompt",
        type=parse_prompt,
        action="append",
        required=True,
        metavar="TEXT",
        help="what to draw; repeat it for several pictures in one batch",
    )
    parser.add_argument(
        "--seed",
        type=parse_seed,
        required=True,
        metavar="S",
        help="seed of the first picture, the next get S+1, S+2, ...",
    )
    parser.add_argument(
        "--out",
        type=_png,
        required=True,
        metavar="FILE.png",
        help="picture to write; of several prompts: FILE-0.png, FILE-1.png, ... in their order",
    )
    parser.add_argument(
        "--schedule",
        metavar="FILE|uniform:PRECISION",
        help="which step runs at which precision (default: the calibrated schedule in the bundle)",
    )
    parser.add_argument("--negative-prompt", type=parse_prompt, metavar="TEXT", help="what guidance leads away from")
    parser.add_argument(
        "--guidance-scale",
        type=parse_guidance_scale,
        metavar="G",
        help="1 or less: no guidance (default: the bundle's)",
    )
    parser.add_argument("--threads", type=parse_threads, metavar="N", help="worker threads (default: one per core)")
    parser.add_argument(
        "--resident-engines",
        type=parse_resident_engines,
        metavar="R",
        help="TensorRT, and torch and ONNX Runtime on a GPU: denoiser engines kept in device memory at once (default: all)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `verify`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Prompt to picture; prints what was written and how long its stages took.

    Everything that can be refused is refused before the loop starts. "load" is the manifest, every
    hash, the denoisers and the decoder; "text" is the tokenizer and the text encoder, their loading
    included; "write" is PNG encoding and the disk.

    Returns:
        0.

    Raises:
        TmpDiffError: the bundle, schedule, prompts or output cannot be used; no picture was written.
    """
    outputs = output_paths(args.out, len(args.prompt))
    require_writable(outputs)
    seeds = [args.seed + index for index in range(len(outputs))]
    seconds = dict.fromkeys(("load", "text", "loop", "decode", "write"), 0.0)
    step_seconds: dict[str, list[float]] = {}

    with _timed(seconds, "load"):
        import numpy as np

        from engines.bundle import Bundle
        from engines.runtime import DenoiseRuntime

        runtime = DenoiseRuntime(Bundle.open(args.bundle), threads=args.threads, resident_engines=args.resident_engines)
        schedule = runtime.bundle.schedule(args.schedule)
        guidance_scale = args.guidance_scale
        if guidance_scale is None:
            guidance_scale = runtime.manifest.sampling.guidance_scale
        if args.negative_prompt and guidance_scale <= 1.0 and not runtime.manifest.embeds_guidance:
            raise TmpDiffError(
                f"--negative-prompt has no effect at guidance scale {guidance_scale:g}; "
                "pass --guidance-scale above 1, or no negative prompt"
            )
    with runtime:
        with _timed(seconds, "text"):  # before the large engines, because it refuses prompts that are too long
            conditioning = runtime.encode(args.prompt, args.negative_prompt)
        with _timed(seconds, "load"):
            runtime.preload(schedule)
        with _timed(seconds, "loop"), np.errstate(over="ignore", invalid="ignore"):  # `decode` refuses what overflowed
            latents = runtime.denoise(
                conditioning,
                schedule,
                runtime.noise(seeds),
                guidance_scale=guidance_scale,
                on_step=lambda _, precision, elapsed: step_seconds.setdefault(precision, []).append(elapsed),
            )
        with _timed(seconds, "decode"):
            pictures = runtime.decode(latents)
    with _timed(seconds, "write"):
        write_pictures(outputs, pictures)

    steps = {precision: len(times) for precision, times in step_seconds.items()}
    step_ms = {precision: 1e3 * sum(times) / len(times) for precision, times in step_seconds.items()}
    if args.json:
        _print_json(
            {
                "pictures": [str(path) for path in outputs],
                "prompts": args.prompt,
                "seeds": seeds,
                "guidance_scale": guidance_scale,
                "schedule_origin": schedule.origin,
                "steps_per_precision": steps,
                "mean_step_ms": step_ms,
                "seconds": seconds,
            }
        )
        return 0
    print(printable(f"wrote {', '.join(map(str, outputs))}"))
    print(
        printable(
            "schedule: "
            + " + ".join(f"{count} {name} at {step_ms[name]:.1f} ms a step" for name, count in steps.items())
            + f" (origin: {schedule.origin}); "
            + ", ".join(f"{stage} {value:.2f} s" for stage, value in seconds.items())
        )
    )
    return 0


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
        _print_json({"bundle": str(args.bundle), "bundle_id": bundle.manifest.bundle_id, "files": checked})
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


def _png(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != PNG:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {PNG}; pictures are written as PNG only")
    return path


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[stage] += time.perf_counter() - begin


def _print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, indent=1, allow_nan=False))


def printable(text: str) -> str:
    """`text` with white space runs as one blank and every other unprintable character escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in " ".join(text.split())
    )


def _drop_stdout() -> None:
    """Points stdout at nothing if it is what failed, or Python would report it once more on its way out."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
