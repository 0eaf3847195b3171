"""What a trained pipeline has learnt: pictures of held-out captions, read back."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from tmpdiff_export.demo.readback import score
from tmpdiff_export.demo.scenes import IMAGE_SIZE, held_out_captions
from tools.demo.families import FLOW_SHIFT, DemoFamily, make_dpm_scheduler

STEPS = 20


def generate(
    pipeline: DiffusionPipeline, captions: list[str], call_options: Mapping[str, Any], guidance_scale: float, seed: int
) -> list[np.ndarray]:
    """Returns one picture [256, 256, 3] uint8 for each caption, in batches of 100; picture i starts from seed + i."""
    pictures: list[np.ndarray] = []
    for start in range(0, len(captions), 100):
        part = captions[start : start + 100]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        output = pipeline(
            part, num_inference_steps=STEPS, guidance_scale=guidance_scale, generator=generators, **call_options
        )
        pictures += full_size([np.asarray(image) for image in output.images])
    return pictures


def evaluate(family: DemoFamily, options: argparse.Namespace) -> None:
    """Loads the saved folder in fp16, prints read-back accuracies, and saves a sheet of held-out scenes."""
    dtype = torch.float16 if options.device == "cuda" else torch.float32
    absent = {"text_encoder_3": None, "tokenizer_3": None} if options.family == "mmdit" else {}
    pipeline = DiffusionPipeline.from_pretrained(options.out, torch_dtype=dtype, **absent).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    kinds = ("plain", "composed", "unusual")
    count = options.evaluation_captions
    captions = {kind: held_out_captions(kind, count, options.seed) for kind in kinds}
    scales = family.guidance_scales
    shifts = (FLOW_SHIFT, FLOW_SHIFT / 2) if options.family == "pixart" else (None,)
    for number, (flow_shift, guidance_scale) in enumerate(product(shifts, scales)):
        if flow_shift is not None:
            pipeline.scheduler = make_dpm_scheduler(flow_shift)
        prompts = [c for kind in kinds for c in captions[kind]]
        pictures = generate(pipeline, prompts, family.call_options, guidance_scale, options.seed)
        shifted = "" if flow_shift is None else f"flow_shift {flow_shift} "
        print(f"{shifted}guidance_scale {guidance_scale}, {STEPS} steps", flush=True)
        for k, kind in enumerate(kinds):
            accuracies = score(pictures[k * count : (k + 1) * count], captions[kind])
            print(f"  {kind}: {percent(accuracies)}", flush=True)
        if number == 0 and options.contact_sheet:
            shown = np.stack(pictures)[np.linspace(0, len(pictures) - 1, 48).astype(int)]
            rows = [np.concatenate(list(row), axis=1) for row in shown.reshape(6, 8, *shown.shape[1:])]
            Image.fromarray(np.concatenate(rows)).save(options.contact_sheet)


def full_size(pictures: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Returns pictures [size, size, 3], uint8, brought to the side that the read-back gate takes."""
    full = (IMAGE_SIZE, IMAGE_SIZE)
    return [np.asarray(Image.fromarray(p).resize(full, Image.Resampling.BILINEAR)) for p in pictures]


def percent(accuracies: dict[str, float]) -> str:
    """Returns accuracies in words."""
    return ", ".join(f"{name} {value:.1%}" for name, value in accuracies.items())
