"""Writes a pipeline folder with random weights, one tensor at a time: no model is ever in memory."""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from engines.files import atomic_write_text
from tmpdiff_export.weights.files import WeightFile
from tools.acceptance.small_text import gemma_tokenizer, t5_tokenizer
from tools.demo.networks import make_clip_tokenizer
from tools.scale.models import CLIP_TOKENS, Component, ScalePipeline, t5_tokens

_FILES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
# The last layer of a block's branches. With a gain of 1 each of some hundred branches would weigh as much as all that came
# before, and errors add up over the depth as they do in no trained denoiser: FP8 would be at 21.7 dB, INT4 at 13.
_BRANCH_END = re.compile(r"\.\d+\.(.*\.)?(to_out\.0|to_add_out|net\.2|proj_out|conv2|conv_point)\.weight$")
BRANCH_GAIN = 0.25
Report = Callable[[str, int, int], None]


def write_folder(
    folder: Path, pipeline: ScalePipeline, components: dict[str, Component], device: str, report: Report
) -> dict[str, int]:
    """Makes the folder; a component that is there already stays.

    Args:
        folder: pipeline folder.
        pipeline: what it is of.
        components: its models by name.
        device: "cuda" or "cpu", where random numbers are drawn.
        report: called with (component, tensors written, of how many).

    Returns:
        Bytes of every component's weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {"_class_name": pipeline.pipeline_class, "_diffusers_version": diffusers.__version__}
    sizes = {}
    for seed, (name, component) in enumerate(components.items()):
        index[name] = [component.library, component.kind]
        told = functools.partial(report, name)
        sizes[name] = write_component(folder / name, component, pipeline.bench.dtype, device, told, seed)
        kind = _tokenizer_of(component)
        if kind is not None:
            words = name.replace("text_encoder", "tokenizer")
            tokenizer = kind(pipeline)
            tokenizer.save_pretrained(folder / words)
            index[words] = ["transformers", type(tokenizer).__name__]
    scheduler, config = pipeline.scheduler
    getattr(diffusers, scheduler)(**config).save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", scheduler]
    index |= pipeline.settings
    atomic_write_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")
    return sizes


def write_component(
    folder: Path,
    component: Component,
    dtype: torch.dtype,
    device: str,
    report: Callable[[int, int], None],
    seed: int,
) -> int:
    """Writes one model's configuration and weights.

    Args:
        folder: of the model.
        component: the model.
        dtype: of its weights.
        device: where random numbers are drawn.
        report: called with (tensors written, of how many).
        seed: of the numbers.

    Returns:
        Bytes of the weight file.
    """
    path = folder / _FILES[component.library]
    if path.exists():
        return path.stat().st_size
    folder.mkdir(exist_ok=True)
    module = _on_meta(component, folder)
    owners = {
        f"{prefix}{'.' if prefix else ''}{name}": (part, name)
        for prefix, part in module.named_modules()
        for name in (*part._parameters, *part._buffers)
    }
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, item in module.state_dict(keep_vars=True).items():
        if id(item) not in seen:  # tied ones are stored once
            seen.add(id(item))
            tensors[name] = item.detach().to(dtype) if item.is_floating_point() else item
    generator = torch.Generator(device).manual_seed(seed)
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with WeightFile(partial, tensors) as file:
        for done, (name, item) in enumerate(tensors.items()):
            tensor = random_tensor(*owners[name], item, generator)
            file.write(name, tensor.mul_(BRANCH_GAIN) if _BRANCH_END.search(name) else tensor)
            report(done + 1, len(tensors))
    partial.rename(path)
    return path.stat().st_size


def random_tensor(part: torch.nn.Module, name: str, wanted: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A tensor that keeps activations of unit size, so that outputs are finite and quantization means something.

    Args:
        part: the module that has it.
        name: in that module.
        wanted: of its shape and dtype; may be on "meta".
        generator: of the device to make it on.
    """
    device, shape = generator.device, wanted.shape
    if not wanted.is_floating_point():
        return torch.arange(wanted.numel(), device=device, dtype=wanted.dtype).reshape(shape)
    if name == "weight" and wanted.ndim == 1:  # of a norm
        return torch.ones(shape, device=device, dtype=wanted.dtype)
    values = torch.randn(shape, generator=generator, device=device)
    if wanted.ndim < 2:
        scale = 0.02  # biases
    elif isinstance(part, torch.nn.Embedding):
        scale = 0.5
    elif isinstance(part, torch.nn.Linear | torch.nn.Conv2d):
        scale = float(wanted[0].numel()) ** -0.5
    else:
        scale = 1.0  # tables of shifts and scales, positions
    return values.mul_(scale).to(wanted.dtype)


def _on_meta(component: Component, folder: Path) -> torch.nn.Module:
    """The model without weights; its configuration is written to `folder`."""
    kind: Any = getattr(importlib.import_module(component.library), component.kind)
    with torch.device("meta"):
        if component.library == "diffusers":
            module: torch.nn.Module = kind(**component.config)
            module.save_config(folder)
            return module
        config = dict(component.config)
        if component.kind.startswith("CLIP"):
            tokenizer = make_clip_tokenizer()
            config |= {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        made = kind.config_class(**config)
        made.save_pretrained(folder)
        module = kind(made)
        return module


def _tokenizer_of(component: Component) -> Callable[[ScalePipeline], Any] | None:
    if component.library != "transformers":
        return None
    if component.kind.startswith("Gemma"):
        return _gemma_tokenizer
    return _t5_tokenizer if component.kind.startswith("T5") else _clip_tokenizer


def _clip_tokenizer(_: ScalePipeline) -> Any:
    tokenizer = make_clip_tokenizer()
    tokenizer.model_max_length = CLIP_TOKENS
    return tokenizer


def _gemma_tokenizer(_: ScalePipeline) -> Any:
    return gemma_tokenizer()


def _t5_tokenizer(pipeline: ScalePipeline) -> Any:
    """Prompts are a few dozen tokens, padded to the length of the published pipeline."""
    return t5_tokenizer(t5_tokens(pipeline.pipeline_class))
