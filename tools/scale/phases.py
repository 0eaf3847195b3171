"""The phases of a proof: each runs a command as a user would, and says what it took."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.bundle import Bundle
from engines.errors import TmpDiffError
from engines.manifest import Manifest
from engines.text import read_prompts
from tools.scale.models import PIPELINES, ScalePipeline
from tools.scale.watch import Attempt, watched

PHASES = ("make", "build", "calibrate", "run", "run-limited", "bench", "peer")
NEEDED = ("make", "build")
"""What the other phases need."""
PROMPTS = Path(__file__).resolve().parents[2] / "calibration" / "prompts" / "plain.txt"
PROMPT = "a picture of a small blue square in the top left"
Note = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Setting:
    """What is asked for.

    Attributes:
        name: of the pipeline, key in `PIPELINES`.
        folder: where the pipeline and the bundle go.
        text: "small" or "full", the text encoders.
        vae: the same, the autoencoder.
        tiny: a small denoiser of the same class, to try the tool.
        device: "cuda" or "cpu": where numbers are drawn, ranges found and engines run.
        backend: of the build.
        precisions: of the build, comma-separated.
        fp8_attention: precisions with attention in FP8, comma-separated; or none.
        compile: "whole" or "blocks", of the torch backend.
        steps: of the loop.
        side: height and width of the picture, None for what the denoiser's latents make.
        prompts: that the build gets.
        samples: prompts that `calibrate` gets, as many for validation.
        rounds: of `bench`.
        build_options: further words for `build`.
        compile_backend: of the peer's torch.compile.
        seconds_limit: of a command, None for none.
    """

    name: str
    folder: Path
    text: str
    vae: str
    tiny: bool
    device: str
    backend: str
    precisions: str
    fp8_attention: str
    compile: str
    steps: int
    side: int | None
    prompts: int
    samples: int
    rounds: int
    build_options: tuple[str, ...]
    compile_backend: str
    seconds_limit: float | None

    @property
    def pipeline(self) -> ScalePipeline:
        """What is made."""
        return PIPELINES[self.name]

    @property
    def source(self) -> Path:
        """The pipeline's folder."""
        return self.folder / "pipeline"

    @property
    def bundle(self) -> Path:
        """The bundle's folder."""
        return self.folder / "bundle"


def run_phase(phase: str, setting: Setting, before: dict[str, Any], note: Note) -> dict[str, Any]:
    """Runs a phase.

    Args:
        phase: one of `PHASES`.
        setting: what is asked for.
        before: what an earlier call that did not end has left of this phase.
        note: called every few seconds with what there is so far.

    Returns:
        JSON data with "status": "done", "failed", or "none" where there is nothing to do.
    """
    if phase == "run-limited" and setting.device == "cpu":
        return {"status": "none", "why": "engines on a CPU know no limit"}
    if phase == "make":
        return _make(setting)
    earlier = [item for item in before.get("attempts", []) if item]

    def collected(attempt: Attempt, status: str) -> dict[str, Any]:
        attempts = [*earlier, attempt.data()]
        return {
            "status": status,
            "command": _shown(attempt.command, setting),
            "seconds": sum(item["seconds"] for item in attempts),
            "attempts": attempts,
        }

    attempt = watched(
        words_of(phase, setting),
        lambda item: note(collected(item, "running")),
        setting.seconds_limit,
        gpu=setting.device == "cuda",
    )
    done = attempt.status == 0
    found = collected(attempt, "done" if done else "failed")
    return {**found, **_results(phase, setting, attempt.output)} if done else found


def words_of(phase: str, setting: Setting) -> list[str]:
    """The command of a phase.

    Raises:
        TmpDiffError: there is no such phase.
    """
    product = [sys.executable, "-m", "tools.scale.command"]
    bundle = str(setting.bundle)
    if phase == "build":
        prompts = setting.folder / "prompts.txt"
        known = read_prompts(PROMPTS)
        lines = ["[calibration]", *known.calibration[: setting.prompts], "[validation]", known.validation[0], ""]
        prompts.write_text("\n".join(lines))
        words = [*product, "build", str(setting.source), "--out", bundle, "--prompts", str(prompts), "--json"]
        words += ["--backend", setting.backend, "--precisions", setting.precisions, "--steps", str(setting.steps)]
        words += ["--range-device", setting.device]
        if setting.backend in ("torch", "onnxruntime"):
            words += ["--device", setting.device]
        if setting.backend == "torch":
            words += ["--batch", "1:1:1", "--compile", setting.compile]
        if setting.fp8_attention:
            words += ["--fp8-attention", setting.fp8_attention]
        if setting.side is not None:
            words += ["--size", f"{setting.side}x{setting.side}"]
        return [*words, *setting.build_options]
    if phase == "calibrate":
        words = [*product, "calibrate", bundle, "--prompts", str(PROMPTS), "--json", "--high-steps"]
        samples = str(setting.samples)
        return [*words, str(setting.steps // 2), "--samples", samples, "--validation-samples", samples]
    if phase in ("run", "run-limited"):
        words = [*product, "run", bundle, "--prompt", PROMPT, "--seed", "1", "--json"]
        words += ["--out", str(setting.folder / f"{phase}.png")]
        opened = Bundle.open(setting.bundle)
        if not opened.schedule_path(opened.setting()).exists():
            words += ["--schedule", f"uniform:{setting.precisions.split(',')[-1]}"]
        return [*words, "--resident-engines", "1"] if phase == "run-limited" else words
    if phase == "bench":
        words = [*product, "bench", bundle, "--rounds", str(setting.rounds), "--json"]
        return [*words, "--resident-engines", "1"] if setting.device == "cuda" else words
    if phase == "peer":
        words = [sys.executable, "-m", "tools.scale.peer", setting.name, "--device", setting.device]
        words += ["--compile-backend", setting.compile_backend]
        return [*words, "--tiny"] if setting.tiny else words
    raise TmpDiffError(f"phase is {phase!r}, expected one of {', '.join(PHASES)}")


def _make(setting: Setting) -> dict[str, Any]:
    """In this process: tensors are drawn and written one by one."""
    from tools.scale.folder import write_folder

    begun = time.perf_counter()
    components = setting.pipeline.components(text=setting.text, vae=setting.vae, tiny=setting.tiny)

    def say(name: str, done: int, total: int) -> None:
        if done == total:
            print(f"make: {name}, {total} tensors", file=sys.stderr, flush=True)

    sizes = write_folder(setting.source, setting.pipeline, components, setting.device, say)
    return {"status": "done", "seconds": time.perf_counter() - begun, "weights_bytes": sizes}


def _results(phase: str, setting: Setting, output: str) -> dict[str, Any]:
    data = json.loads(output)
    if phase == "build":
        manifest = Manifest.model_validate_json((setting.bundle / "manifest.json").read_text())
        engines = {
            name: {
                "sqnr_db": entry.sqnr_db,
                "sqnr_floor_db": entry.sqnr_floor_db,
                "lowering": entry.lowering,
                "bytes": entry.bytes,
            }
            for name, entry in manifest.engines().items()
        }
        return {
            "parameters": manifest.model.parameters,
            "engines": engines,
            "files": bundle_files(setting.bundle),
            "separate_bytes": sum(entry["bytes"] for entry in engines.values()),
        }
    if phase == "calibrate":
        return {"calls": data.get("calls"), "num_samples": data.get("num_samples")}
    kept = ("seconds", "mean_step_ms", "steps_per_precision", "schedule_origin")
    return {"result": {key: data[key] for key in kept} if phase.startswith("run") else data}


def bundle_files(bundle: Path) -> dict[str, int]:
    """Bytes of a bundle by file; one that stands there under several names counts once."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    for path in sorted(bundle.rglob("*")):
        if path.is_file() and path.stat().st_ino not in seen:
            seen.add(path.stat().st_ino)
            found[path.relative_to(bundle).as_posix()] = path.stat().st_size
    return found


def _shown(words: list[str], setting: Setting) -> str:
    """A command for the result file, without this machine's paths."""
    shown = " ".join(words[1:]).replace("-m tools.scale.command", "tmpdiff-export")
    for path in (setting.folder, PROMPTS.parents[2]):
        shown = shown.replace(f"{path}/", "")
    return f"python {shown}" if shown.startswith("-m") else shown
