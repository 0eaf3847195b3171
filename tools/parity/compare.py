"""One family: its small pipeline, the bundle built from it, and how far the two are apart in every cell."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from engines.errors import TmpDiffError
from engines.precision import REFERENCE
from engines.runtime import DenoiseRuntime
from engines.setting_choice import SettingChoice, size_text
from tmpdiff_export import BuildOptions, attach, build, detach
from tmpdiff_export.calibrate.settings import Wanted, open_setting
from tools.acceptance.odd_prompts import NEGATIVES, ODD_PROMPTS
from tools.acceptance.text_pipelines import TEXT_PIPELINES
from tools.parity.cells import COMBINED, DEFAULT, Cell
from tools.parity.families import ParityFamily

TOLERANCE = 1e-3
"""The largest relative difference (L2 norm) of latents that is rounding."""
GREY_LEVELS = 1
"""The largest difference of pictures that is rounding."""
EFFECT = 10 * TOLERANCE
"""How far another prompt has to move the latents, so that a text that is read wrongly shows."""
SEEDS = (7, 4_000_000_007)
SECOND = ("A green DOT, left!", "a <dot>")  # prompt and negative prompt of the second picture
SCHEDULE = f"uniform:{REFERENCE}"
WITH_PICTURES = (DEFAULT, COMBINED, "size", "batch")
THREADS = 1  # a family each; small matrices gain nothing from more


@dataclass(frozen=True)
class Trial:
    """A pipeline folder and its bundles.

    Attributes:
        family: what it is of.
        pipe: the pipeline as diffusers loads it.
        folder: holds the folder `pipeline`, and what is built.
    """

    family: ParityFamily
    pipe: Any
    folder: Path

    def call(self, cell: Cell, output_type: str) -> np.ndarray:
        """What the pipeline returns: latents float32 [N, C, h, w], or pictures uint8 [N, H, W, 3]."""
        height, width = cell.size
        negatives = NEGATIVES[cell.negative]
        options: dict[str, Any] = {
            "negative_prompt": None if negatives is None else _of_batch(cell, negatives, SECOND[1]),
            "max_sequence_length": cell.text_length,
            "guidance_scale": cell.guidance_scale,
            "guidance_rescale": cell.guidance_rescale or None,
            "clip_skip": cell.clip_skip,
        }
        self.pipe.scheduler = self.family.schedulers[cell.scheduler].make()
        found = self.pipe(
            prompt=_of_batch(cell, ODD_PROMPTS[cell.prompt], SECOND[0]),
            height=height,
            width=width,
            num_inference_steps=cell.steps,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in SEEDS[: cell.batch]],
            output_type=output_type,
            **{name: value for name, value in options.items() if value is not None},
            **self.family.call_options,
        ).images
        if output_type != "latent":
            return np.rint(found * 255.0).astype(np.uint8)
        if self.family.packed:
            found = self.pipe._unpack_latents(found, height, width, self.pipe.vae_scale_factor)
        return found.numpy()

    def bundle(self, clip_skip: int | None) -> Path:
        """Builds the bundle of a clip skip."""
        family, out = self.family, self.folder / f"clip-skip-{clip_skip}.bundle"
        options = BuildOptions(
            precisions=(REFERENCE,),
            prompts=tuple(ODD_PROMPTS[name] for name in ("plain", "upper case")),
            steps=(family.axes["steps"][0],),
            sizes=family.sizes[:2],
            text_lengths=tuple(length for length in family.text_lengths if length is not None),
            clip_skip=clip_skip,
            backend="onnxruntime",
        )
        build(self.folder / "pipeline", out, options)
        return out

    def setting(self, bundle: Path, cell: Cell) -> str:
        """The name of a cell's setting, which is added to the bundle if it is not there."""
        default = Cell.default(self.family)
        asked = Wanted(
            SettingChoice(steps=cell.steps, size=cell.size),
            guidance_scale=cell.guidance_scale or self._own_guidance_scale(),
            text_length=cell.text_length,
            scheduler=None,
        )
        if (cell.scheduler, cell.steps, cell.guidance_scale) != (default.scheduler, default.steps, None) or (
            cell.size not in self.family.sizes[:2]
        ):  # not of the build; by name, because "any scheduler" would do for one that was added before
            file = self.folder / f"{cell.scheduler}.json"
            file.write_text(self.family.schedulers[cell.scheduler].make().to_json_string(), encoding="utf-8")
            asked = Wanted(asked.choice, asked.guidance_scale, asked.text_length, str(file))
        return open_setting(bundle, asked)[0].name

    def _own_guidance_scale(self) -> float | None:
        if self.family.guidance_scales == (None,):
            return None
        return float(inspect.signature(type(self.pipe).__call__).parameters["guidance_scale"].default)


def measure(family: ParityFamily, chosen: Sequence[tuple[str, Cell]], folder: Path) -> dict[str, Any]:
    """Everything that is found out about a family.

    Args:
        family: with its small pipeline.
        chosen: cells, with the axis that differs.
        folder: empty; pipeline and bundles go there.

    Returns:
        JSON data: title, `another_prompt` (the relative difference that another prompt makes) and a row per cell.

    Raises:
        TmpDiffError: the pipeline cannot be built or has no such setting; or another prompt makes too little difference.
    """
    torch.set_num_threads(THREADS)
    with _quiet():
        trial = Trial(family, _saved(family, folder / "pipeline"), folder)
        rows: list[tuple[int, dict[str, Any]]] = []
        effect = 0.0
        for clip_skip in dict.fromkeys(cell.clip_skip for _, cell in chosen):
            bundle = trial.bundle(clip_skip)
            own = [(index, *pair) for index, pair in enumerate(chosen) if pair[1].clip_skip == clip_skip]
            names = [trial.setting(bundle, cell) for _, _, cell in own]
            with DenoiseRuntime.load(bundle, threads=THREADS) as runtime:
                for name, (index, axis, cell) in zip(names, own, strict=True):
                    at = runtime.at(SettingChoice(named=name))
                    rows.append((index, _row(trial, at, axis, cell)))
                if not effect:
                    effect = _effect(runtime, Cell.default(family))
    if effect < EFFECT:
        raise TmpDiffError(
            f"{family.title}: another prompt changes the latents by {effect:.1e}, expected {EFFECT:.0e} at least, or wrong "
            "texts would not show; give its small pipeline larger weights"
        )
    return {
        "title": family.title,
        "another_prompt": effect,
        "cells": [row for _, row in sorted(rows, key=lambda row: row[0])],
    }


def failures(found: dict[str, Any]) -> Iterator[str]:
    """The cells of a family's result that are off by more than rounding, in words."""
    for row in found["cells"]:
        if not row["latents"] <= TOLERANCE or not row.get("grey_levels", 0) <= GREY_LEVELS:
            apart = f"latents {row['latents']:.1e}" + (
                f", {row['grey_levels']} grey levels" if "grey_levels" in row else ""
            )
            yield f"{found['title']}: {apart} from diffusers at {row['cell']}"


def _row(trial: Trial, runtime: DenoiseRuntime, axis: str, cell: Cell) -> dict[str, Any]:
    expected = trial.call(cell, "latent")
    schedule = runtime.bundle.schedule(runtime.setting, SCHEDULE)
    row: dict[str, Any] = {"axis": axis, "cell": {**asdict(cell), "size": size_text(*cell.size)}}
    if cell.attached:
        attach(trial.pipe, runtime, schedule=schedule)
        found = trial.call(cell, "latent")
        detach(trial.pipe)
    else:
        negative = NEGATIVES[cell.negative]
        found = runtime.denoise(
            runtime.encode(
                _of_batch(cell, ODD_PROMPTS[cell.prompt], SECOND[0]),
                None if negative is None else _of_batch(cell, negative, SECOND[1]),
            ),
            schedule,
            runtime.noise(SEEDS[: cell.batch]),
            guidance_rescale=cell.guidance_rescale,
        )
        if axis in WITH_PICTURES:
            pictures = trial.call(cell, "np").astype(int)
            row["grey_levels"] = int(np.abs(runtime.decode(found) - pictures).max())
    return {**row, "latents": _relative(found, expected)}


def _effect(runtime: DenoiseRuntime, default: Cell) -> float:
    """How far another prompt moves the latents of the default cell."""
    schedule = runtime.bundle.schedule(runtime.setting, SCHEDULE)
    plain, other = (
        runtime.denoise(runtime.encode([prompt]), schedule, runtime.noise(SEEDS[:1]))
        for prompt in (ODD_PROMPTS[default.prompt], SECOND[0])
    )
    return _relative(other, plain)


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _of_batch(cell: Cell, first: str, second: str) -> list[str]:
    return [first, second][: cell.batch]


def _saved(family: ParityFamily, folder: Path) -> Any:
    """The pipeline of a family with numbers that FP16 holds, written to a folder and loaded from it."""
    made = TEXT_PIPELINES[family.maker]()
    made.scheduler = next(iter(family.schedulers.values())).make()
    for part in made.components.values():
        for tensor in (*part.parameters(), *part.buffers()) if isinstance(part, torch.nn.Module) else ():
            if tensor.is_floating_point():
                tensor.data = tensor.half().float()
    made.save_pretrained(folder)
    absent = {name: None for name, part in made.components.items() if part is None}
    pipe = type(made).from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    text_encoder = type(pipe.text_encoder)
    if not hasattr(pipe.text_encoder, "text_model"):  # where StableDiffusionPipeline looks with a clip skip
        text_encoder.text_model = property(lambda self: self)
    return pipe


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and advice of the libraries."""
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    try:
        yield
    finally:
        for library in (diffusers, transformers):
            library.logging.enable_progress_bar()
