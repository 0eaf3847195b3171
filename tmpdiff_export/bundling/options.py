"""What a build is asked for, and what is refused before it starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from engines.arguments import MAX_STEPS
from engines.errors import BuildError
from engines.precision import Precision
from tmpdiff_export.bundling.preflight import require_folders
from tmpdiff_export.targets.choose import require_own_settings
from tmpdiff_export.targets.settings import MAX_BATCH
from tmpdiff_export.targets.tensorrt.settings import PlanSettings
from tmpdiff_export.targets.torch.settings import PackageSettings

if TYPE_CHECKING:
    from tmpdiff_export.pipelines.settings import SettingRequest

MAX_SETTINGS = 64  # a table is computed for each before anything else


@dataclass(frozen=True)
class BuildOptions:
    """What a build is asked for.

    Attributes:
        precisions: engines to build, the reference among them.
        prompts: prompts for range calibration and the accuracy check; two at least.
        steps: `num_inference_steps` of the settings; the first is the default, as for `sizes` and `text_lengths`.
        sizes: picture sizes of the settings, (height, width) in pixels; empty for the pipeline's own.
        text_lengths: of the text encoders whose length may vary; empty for the pipeline's own.
        clip_skip: how many of the last layers CLIP text encoders leave out, None for what the pipeline does.
        seed: seed of the first calibration run.
        backend: "auto" or a backend name.
        guidance_scale: None for the pipeline's default.
        variant: of the weight files (`save_pretrained(variant=)`), None for those without one, or the only one there.
        onnx_dir: keep the strongly typed `<precision>.onnx` files here, None to drop them.
        force: replace an existing bundle.
        plans: settings of TensorRT plans; refused by other backends unless left alone, but for the batch, which torch
            packages have too.
        share_weights: for torch packages; see `PackageSettings`.
        device: "cuda" or "cpu", what engines of the torch and onnxruntime backends are for; None for the GPU with
            torch, for the CPU with ONNX Runtime, and for other backends.
        workers: for torch packages; see `PackageSettings`. The script that asks for more than one has to start its work
            under `if __name__ == "__main__"`: workers import it.
        fp8_attention: for torch packages; see `PackageSettings`.
        compile: for torch packages; see `PackageSettings`.
        text_encoder_weights: "int8" stores the linear layers of the text encoders in 8 bit, for torch packages and ONNX
            Runtime; None for 16 bit.
        range_device: "cpu" or "cuda", where the pipeline runs in float32 for the ranges and for what engines are
            checked against, whatever the backend.
        keep_stages: keep finished stages beside the bundle after success too, for a build with other options.
        restart: begin without the finished stages of an earlier build.
    """

    precisions: tuple[Precision, ...]
    prompts: tuple[str, ...]
    steps: tuple[int, ...] = (20,)
    sizes: tuple[tuple[int, int], ...] = ()
    text_lengths: tuple[int, ...] = ()
    clip_skip: int | None = None
    seed: int = 0
    backend: str = "auto"
    guidance_scale: float | None = None
    variant: str | None = None
    onnx_dir: Path | None = None
    force: bool = False
    plans: PlanSettings = field(default_factory=PlanSettings)
    device: str | None = None
    share_weights: Precision | None = None
    workers: int = 1
    fp8_attention: tuple[Precision, ...] = ()
    compile: Literal["whole", "blocks"] = "whole"
    text_encoder_weights: Literal["int8"] | None = None
    range_device: str = "cpu"
    restart: bool = False
    keep_stages: bool = False

    def requests(self) -> list[SettingRequest]:
        """A setting for every number of steps, size and text length; the default one first."""
        from tmpdiff_export.pipelines.settings import SettingRequest  # which imports torch

        return [
            SettingRequest(steps, size, self.guidance_scale, text_length, clip_skip=self.clip_skip)
            for size in self.sizes or (None,)
            for text_length in self.text_lengths or (None,)
            for steps in self.steps
        ]

    @property
    def packages(self) -> PackageSettings:
        """The settings of torch packages.

        Raises:
            BackendError: a number of workers out of range.
        """
        return PackageSettings(self.share_weights, self.fp8_attention, self.workers, self.compile)


def require_buildable(options: BuildOptions, out: Path, backend: str) -> None:
    """Refuses before the work what could not be built, or not be written after it; without importing torch, where it can.

    Args:
        options: of the build.
        out: bundle folder to make.
        backend: its name, resolved.

    Raises:
        BuildError: too few prompts, or a number of steps or pictures out of range.
        BackendError: settings of another backend, or of an engine that is not built; or there is no such device.
        TmpDiffError: a folder stands where none should be replaced, or cannot be written.
    """
    if len(options.prompts) < 2:
        raise BuildError(
            f"a build needs at least 2 calibration prompts (one checks what the others calibrate), got {len(options.prompts)}"
        )
    if not options.steps or not all(1 <= steps <= MAX_STEPS for steps in options.steps):
        listed = ", ".join(map(str, options.steps)) or "none"
        raise BuildError(f"number of steps is {listed}, expected 1 to {MAX_STEPS}")
    count = len(options.steps) * max(len(options.sizes), 1) * max(len(options.text_lengths), 1)
    if count > MAX_SETTINGS:
        raise BuildError(
            f"{count} settings are asked for, expected {MAX_SETTINGS} at most; `calibrate` adds those that are needed later"
        )
    for name, given in (("steps", options.steps), ("size", options.sizes), ("text-length", options.text_lengths)):
        if len(set(given)) < len(given):
            raise BuildError(f"--{name} names the same twice; name each once")
    if options.plans.batch.max > MAX_BATCH:
        raise BuildError(f"--batch is {options.plans.batch}, expected {MAX_BATCH} pictures at most")
    packages = options.packages
    require_own_settings(backend, options.device, packages, options.plans, options.text_encoder_weights)
    packages.require_built(options.precisions)
    require_folders(out, options.onnx_dir, force=options.force)
    if options.range_device != "cpu":
        from tmpdiff_export.devices import require_device  # which imports torch

        require_device(options.range_device)
