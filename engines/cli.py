"""`tmpdiff-runtime`: prompt to picture from a bundle, without torch or diffusers.

`tmpdiff-export run` and `verify` are the same functions. Libraries are imported by the command that
needs them, so that `--help`, `--version` and a wrong argument answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.errors import TmpDiffError
from engines.version import VERSION

if TYPE_CHECKING:
    import numpy as np

PROGRAM = "tmpdiff-runtime"
INTERRUPTED = 130
MAX_SEED = (1 << 63) - 1
MAX_THREADS = 1024
MAX_RESIDENT_ENGINES = 64
PNG = ".png"


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
    parser.add_argument(
        "--negative-prompt", type=parse_prompt, default="", metavar="TEXT", help="what guidance leads away from"
    )
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
    _check_writable(outputs)
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
    print(_one_line(f"wrote {', '.join(map(str, outputs))}"))
    print(
        _one_line(
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
        print(_one_line(f"bundle {args.bundle} is whole: {checked} files checked, id {bundle.manifest.bundle_id[:12]}"))
    return 0


def output_paths(out: Path, count: int) -> list[Path]:
    """One path per picture: `out` itself, or with "-0", "-1", ... before its extension."""
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{index}{out.suffix}") for index in range(count)]


def write_pictures(paths: Sequence[Path], pictures: np.ndarray) -> None:
    """Writes PNG files, each atomically and only after all are encoded.

    Args:
        paths: N files.
        pictures: uint8 [N, H, W, 3].

    Raises:
        TmpDiffError: a file cannot be written.
    """
    from PIL import Image

    from engines.files import atomic_write_bytes

    encoded = []
    for picture in pictures:
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, format="PNG")
        encoded.append(stream.getvalue())
    for path, data in zip(paths, encoded, strict=True):
        try:
            atomic_write_bytes(path, data)
        except OSError as error:
            raise TmpDiffError(f"picture {path} cannot be written: {_reason(error)}") from error


def guarded(program: str, command: Callable[[], int]) -> int:
    """Runs a command and turns its failure into one line on stderr.

    Returns:
        What `command` returns; 1 when it failed, 130 when it was interrupted.
    """
    for stream in (sys.stdout, sys.stderr):  # a path need not be printable in the terminal's encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # a container that stops us, as Ctrl-C
        status = command()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as stop:  # its argument is what a command says of what it leaves
        # A terminal signals a frozen program twice: by itself and through its boot loader.
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        left = stop.args[0] if stop.args else "nothing half-written is left"
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
        message = f"{error.filename}: {_reason(error)}" if error.filename else _reason(error)
        _drop_stdout()
    print(f"{program}: error: {_one_line(message)}", file=sys.stderr)
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


def parse_prompt(text: str) -> str:
    """An argument that is a prompt."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("the text is not valid UTF-8") from None
    return text


def parse_seed(text: str) -> int:
    """An argument that is a seed."""
    return _integer(text, 0, MAX_SEED)


def parse_threads(text: str) -> int:
    """An argument that is a number of threads."""
    return _integer(text, 1, MAX_THREADS)


def parse_resident_engines(text: str) -> int:
    """An argument that limits how many denoiser engines are resident."""
    return _integer(text, 1, MAX_RESIDENT_ENGINES)


def _integer(text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not an integer in {low}..{high}")
    return value


def parse_guidance_scale(text: str) -> float:
    """An argument that is a guidance scale."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0.0):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a finite number of 0 or more")
    return value


def _png(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != PNG:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {PNG}; pictures are written as PNG only")
    return path


def _check_writable(paths: Sequence[Path]) -> None:
    """Refuses outputs that could not be written after the work."""
    folder = paths[0].parent
    if not folder.is_dir():
        raise TmpDiffError(f"output folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise TmpDiffError(f"output folder {folder} is not writable")
    for path in paths:
        if path.is_dir():
            raise TmpDiffError(f"output {path} is a folder; name a file")


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[stage] += time.perf_counter() - begin


def _print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, indent=1, allow_nan=False))


def _one_line(text: str) -> str:
    """`text` with white space runs as one blank and every other unprintable character escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in " ".join(text.split())
    )


def _reason(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "the disk is full; free some space and try again"
    return error.strerror or str(error)


def _drop_stdout() -> None:
    """Points stdout at nothing if it is what failed, or Python would report it once more on its way out."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
