"""The command `run`: prompt to picture."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from engines.arguments import (
    add_setting_arguments,
    parse_guidance_scale,
    parse_prompt,
    parse_resident_engines,
    parse_seed,
    parse_share,
    parse_threads,
    setting_choice,
)
from engines.errors import PromptError, TmpDiffError, shortened
from engines.files import require_writable
from engines.pictures import PNG, output_paths, write_pictures
from engines.terminal import StepBar, print_json, printable

NAMED = 4  # prompts in one line of warning


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
        help="which step runs at which precision (default: the calibrated schedule of the setting)",
    )
    add_setting_arguments(parser)
    parser.add_argument(
        "--negative-prompt",
        type=parse_prompt,
        action="append",
        metavar="TEXT",
        help="what guidance leads away from: once for all pictures, or as often as --prompt",
    )
    parser.add_argument(
        "--guidance-scale",
        type=parse_guidance_scale,
        metavar="G",
        help="1 or less: no guidance (default: the setting's)",
    )
    parser.add_argument(
        "--guidance-rescale",
        type=parse_share,
        default=0.0,
        metavar="R",
        help="share, 0 to 1, that guidance is brought back to the spread of the conditional output (SD and SDXL; default 0)",
    )
    parser.add_argument(
        "--strict-prompts",
        action="store_true",
        help="refuse prompts that are too long for a text encoder (default: cut)",
    )
    parser.add_argument("--steps-progress", action="store_true", help="show the steps on stderr, if that is a terminal")
    parser.add_argument("--threads", type=parse_threads, metavar="N", help="worker threads (default: one per core)")
    parser.add_argument(
        "--resident-engines",
        type=parse_resident_engines,
        metavar="R",
        help="TensorRT, and torch and ONNX Runtime on a GPU: denoiser engines kept in device memory at once (default: all)",
    )
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

        runtime = DenoiseRuntime(
            Bundle.open(args.bundle),
            setting=setting_choice(args),
            threads=args.threads,
            resident_engines=args.resident_engines,
        )
        schedule = runtime.schedule(args.schedule)
        runtime.require_guidance_rescale(args.guidance_rescale)
        guidance_scale = args.guidance_scale
        if guidance_scale is None:
            guidance_scale = runtime.setting.guidance_scale
        if any(args.negative_prompt or ()) and guidance_scale <= 1.0 and not runtime.manifest.embeds_guidance:
            raise TmpDiffError(
                f"--negative-prompt has no effect at guidance scale {guidance_scale:g}; "
                "pass --guidance-scale above 1, or no negative prompt"
            )
    progress = StepBar(runtime.num_steps, shown=args.steps_progress and sys.stderr.isatty())

    def on_step(step_index: int, precision: str, elapsed: float) -> None:
        step_seconds.setdefault(precision, []).append(elapsed)
        progress.show(step_index + 1, precision)

    with runtime, progress:
        with _timed(seconds, "text"):  # before the large engines, because it refuses prompts that are too long
            conditioning = runtime.encode(args.prompt, args.negative_prompt)
        _say_what_was_cut(conditioning.cut, strict=args.strict_prompts)
        with _timed(seconds, "load"):
            runtime.preload(schedule)
        with _timed(seconds, "loop"), np.errstate(over="ignore", invalid="ignore"):  # `decode` refuses what overflowed
            latents = runtime.denoise(
                conditioning,
                schedule,
                runtime.noise(seeds),
                guidance_scale=guidance_scale,
                guidance_rescale=args.guidance_rescale,
                on_step=on_step,
            )
        with _timed(seconds, "decode"):
            pictures = runtime.decode(latents)
    with _timed(seconds, "write"):
        write_pictures(outputs, pictures)

    steps = {precision: len(times) for precision, times in step_seconds.items()}
    step_ms = {precision: 1e3 * sum(times) / len(times) for precision, times in step_seconds.items()}
    if args.json:
        print_json(
            {
                "pictures": [str(path) for path in outputs],
                "prompts": args.prompt,
                "seeds": seeds,
                "setting": runtime.setting.name,
                "cut": [list(pair) for pair in conditioning.cut],
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
            + f" (origin: {schedule.origin}), setting {runtime.setting.name}; "
            + ", ".join(f"{stage} {value:.2f} s" for stage, value in seconds.items())
        )
    )
    return 0


def _say_what_was_cut(cut: Sequence[tuple[str, str]], *, strict: bool) -> None:
    """One line on stderr that names what no text encoder reads.

    Raises:
        PromptError: it is to be refused.
    """
    if not cut:
        return
    parts = "; ".join(f"{shortened(prompt)!r} without {shortened(words)!r}" for prompt, words in cut[:NAMED])
    parts += f"; and {len(cut) - NAMED} more that are cut" if len(cut) > NAMED else ""
    if strict:
        raise PromptError(f"prompts are longer than the text encoder takes, which would read {parts}; shorten them")
    print(printable(f"warning: prompts are longer than the text encoder takes, it reads {parts}"), file=sys.stderr)


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
