"""One graph per denoiser and VAE decoder for every size: against diffusers, at sizes unlike the traced one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderDC, AutoencoderKL, AutoencoderTiny, ConsistencyDecoderVAE
from diffusers.image_processor import VaeImageProcessor
from helpers.stored_graphs import save_stored

from engines.backends.onnxruntime.cpu import OnnxRuntimeEngine
from engines.manifest import LATENTS, MODEL_OUTPUT
from engines.precision import REFERENCE
from tmpdiff_export.devices import Batch
from tmpdiff_export.onnx_graphs.export import ExportInput, export_graph
from tmpdiff_export.onnx_graphs.shape_folding import fold_shapes
from tmpdiff_export.pipelines.families.family import LATENT_AXES, VaeCall
from tmpdiff_export.pipelines.families.flux import FLUX, MOST_TOKENS, PACKING, pack, unpack
from tmpdiff_export.pipelines.families.pixart import PIXART
from tmpdiff_export.pipelines.families.sd3 import SD3
from tmpdiff_export.pipelines.families.table import DENOISERS
from tmpdiff_export.pipelines.families.unet import UNET, UNET_SDXL
from tmpdiff_export.pipelines.families.vae import picture_axes, vae_decoder, vae_refusal
from tmpdiff_export.quantization.sixteen_bit import NO_RECIPE
from tmpdiff_export.targets.exported import typed_graph
from tmpdiff_export.targets.onnxruntime.lowering import lower_for_cpu
from tmpdiff_export.targets.target import EngineJob
from tools.acceptance.export_families import family_model
from tools.acceptance.miniatures import Miniature, miniature

# Of latents; the first is the traced one. UNets and Sana take odd ones.
EVEN = ((16, 8), (6, 12), (10, 14))
ODD = ((16, 8), (13, 21), (9, 7))
SIZES = dict.fromkeys(DENOISERS, EVEN) | dict.fromkeys(("sana", "unet", "unet-sdxl"), ODD)
EAGER_ERROR, ENGINE_ERROR = 1e-5, 1e-3


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def handed(name: str) -> Batch:
    """What a pipeline hands its denoiser."""
    return miniature(name).batches(2, seed=1)[1]


def at(name: str, size: tuple[int, int]) -> Batch:
    """The same with latents of another size."""
    latents, *rest = handed(name)
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(*latents.shape[:2], *size, generator=generator), *rest)


def diffusers_call(small: Miniature, batch: Batch) -> torch.Tensor:
    """The denoiser as its pipeline calls it."""
    latents, timestep, text, *rest = batch
    height, width = latents.shape[2:]
    call: dict[str, Any] = {"encoder_hidden_states": text, "return_dict": False}
    match small.name:
        case "pixart":
            pixels = int(small.pipe.vae_scale_factor)
            added = {
                "resolution": torch.tensor([[height * pixels, width * pixels]] * len(latents)).float(),
                "aspect_ratio": torch.tensor([[height / width]] * len(latents)),
            }
            call |= {"encoder_attention_mask": rest[0], "added_cond_kwargs": added}
        case "sana":
            call |= {"encoder_attention_mask": rest[0]}
        case "sd3":
            call |= {"pooled_projections": rest[0]}
        case "flux" | "flux-schnell":
            rows, columns = height // PACKING, width // PACKING
            ids = small.pipe._prepare_latent_image_ids(1, rows, columns, "cpu", torch.float32)
            call |= {"pooled_projections": rest[0], "guidance": rest[1] if rest[1:] else None}
            call |= {"img_ids": ids, "txt_ids": torch.zeros(text.shape[1], 3)}
            with torch.inference_mode():
                return unpack(small.denoiser(pack(latents), timestep=timestep / 1000, **call)[0], rows, columns)
        case "unet-sdxl":
            call |= {"added_cond_kwargs": dict(zip(("text_embeds", "time_ids"), rest, strict=True))}
    with torch.inference_mode():
        returned = small.denoiser(latents, timestep=timestep, **call)[0]
    return returned[:, : latents.shape[1]]


def error(measured: np.ndarray, expected: torch.Tensor) -> float:
    assert measured.shape == tuple(expected.shape)
    return float(np.linalg.norm(measured - expected.numpy()) / np.linalg.norm(expected.numpy()))


def require_parity(make: Callable[[], Miniature], sizes: tuple[tuple[int, int], ...], folder: Path) -> None:
    """Of one wrapper, and of one FP16 graph of it, in the form that a CPU computes it."""
    small = make()
    module = small.wrap()
    model = family_model(make(), [at(small.name, sizes[0])])  # which takes the weights of its denoiser
    lowered, _ = lower_for_cpu(typed_graph(EngineJob("fp16", model, NO_RECIPE, REFERENCE, {}, 0.0)))
    engine = OnnxRuntimeEngine(save_stored(lowered, folder / "engine.onnx", module))
    for size in sizes:
        batch = at(small.name, size)
        expected = diffusers_call(small, batch)
        with torch.inference_mode():
            assert error(module(*batch).numpy(), expected) < EAGER_ERROR, size
        feeds = {name: item.numpy() for name, item in zip(small.family.inputs, batch, strict=True)}
        assert error(engine.run(feeds)[MODEL_OUTPUT], expected) < ENGINE_ERROR, size


@pytest.mark.parametrize("name", DENOISERS)
def test_one_graph_draws_every_size(name: str, tmp_path: Path) -> None:
    require_parity(lambda: miniature(name), SIZES[name], tmp_path)


def changed(name: str, **config: Any) -> Miniature:
    """A miniature whose denoiser has another configuration, with the same weights every time."""
    small = miniature(name)
    made = type(small.denoiser)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        other = made.from_config({**small.denoiser.config, **config}).eval().requires_grad_(False)
    setattr(small.pipe, small.family.component, other)
    return small


@pytest.mark.parametrize(
    ("name", "config"),
    [
        # told the size of the picture, with positions that are stretched to it
        ("pixart", {"use_additional_conditions": True, "num_attention_heads": 6, "cross_attention_dim": 192,
                    "interpolation_scale": 2}),
        ("sana", {"interpolation_scale": 2.0}),  # with positions
        ("sana", {"patch_size": 2}),
        ("unet", {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1, "norm_num_groups": 8, **{
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        }}),  # as deep as Stable Diffusion's
    ],
)  # fmt: skip
def test_other_configurations_draw_every_size(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    sizes = ((32, 48), (65, 47), (41, 27)) if name == "unet" else EVEN
    require_parity(lambda: changed(name, **config), sizes, tmp_path)


def test_a_denoiser_says_up_to_which_side_it_has_positions(tmp_path: Path) -> None:
    small = miniature("sd3")  # with 16 x 16 positions for tokens of 2 x 2
    most = SD3.largest_side(small.denoiser.config)
    assert most == 32
    require_parity(lambda: miniature("sd3"), ((8, 4), (most, 4), (4, most)), tmp_path)
    with pytest.raises(ValueError, match="cannot be greater than `pos_embed_max_size`"):
        diffusers_call(small, at("sd3", (most + 2, 4)))
    assert FLUX.largest_side(miniature("flux").denoiser.config) == PACKING * MOST_TOKENS
    assert PIXART.largest_side(miniature("pixart").denoiser.config) is None


SMALL = {"block_out_channels": (16, 32), "norm_num_groups": 8}
DOWN, UP = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
KL: dict[str, Any] = {**SMALL, "down_block_types": DOWN, "up_block_types": UP, "shift_factor": 0.25}
MEAN, STD = [0.1, -0.2, 0.3, 0.4], [1.0, 2.0, 0.5, 0.7]


def tiny_vae() -> AutoencoderTiny:
    channels, blocks = (16, 16), (1, 1)
    return AutoencoderTiny(
        encoder_block_out_channels=channels, decoder_block_out_channels=channels, num_encoder_blocks=blocks,
        num_decoder_blocks=blocks, shift_factor=0.25,
    )  # fmt: skip


def asymmetric_vae() -> AsymmetricAutoencoderKL:
    return AsymmetricAutoencoderKL(
        down_block_types=DOWN, down_block_out_channels=(8, 16), up_block_types=UP, up_block_out_channels=(16, 32),
        norm_num_groups=8,
    )  # fmt: skip


def dc_vae() -> AutoencoderDC:
    kinds, channels, layers, scales = ("ResBlock", "EfficientViTBlock"), (16, 32), (1, 1), ((), (5,))
    return AutoencoderDC(
        latent_channels=4, attention_head_dim=8, encoder_block_types=kinds, decoder_block_types=kinds,
        encoder_block_out_channels=channels, decoder_block_out_channels=channels, encoder_layers_per_block=layers,
        decoder_layers_per_block=layers, encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales,
        scaling_factor=0.41407,
    )  # fmt: skip


def vae_pipe(vae: torch.nn.Module | None, channels: int = 4) -> Any:
    denoiser = SimpleNamespace(config=SimpleNamespace(in_channels=channels))
    return SimpleNamespace(vae=vae, vae_scale_factor=2, transformer=denoiser, unet=denoiser)


SANA_VAE = replace(PIXART, vae=VaeCall(classes=("AutoencoderDC",)))


@pytest.mark.parametrize(
    ("make", "family"),
    [
        (lambda: AutoencoderKL(**KL), UNET),  # whose pipelines do not read the shift
        (lambda: AutoencoderKL(**KL), PIXART),
        (lambda: AutoencoderKL(**KL), SD3),
        (lambda: AutoencoderKL(**KL, use_quant_conv=False, use_post_quant_conv=False), SD3),
        (lambda: AutoencoderKL(**KL, latents_mean=MEAN, latents_std=STD), UNET_SDXL),
        (lambda: AutoencoderKL(**KL, latents_mean=MEAN), UNET_SDXL),  # of which the pipeline wants both
        (lambda: AutoencoderKL(**KL, latents_mean=MEAN, latents_std=STD), UNET),  # which does not read them
        (tiny_vae, UNET),
        (tiny_vae, SD3),
        (asymmetric_vae, UNET),
        (dc_vae, SANA_VAE),
    ],
    ids=lambda item: getattr(item, "denoiser_class", None),
)
def test_one_decoder_draws_every_size_as_the_pipeline_does(
    make: Callable[[], torch.nn.Module], family: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    pipe = vae_pipe(make().eval().requires_grad_(False))
    assert vae_refusal(pipe, family) is None
    config, module = pipe.vae.config, vae_decoder(pipe, family).eval()
    example = torch.randn(1, 4, 5, 4)  # `AutoencoderDC` would attend to these in another way than to more
    graph = export_graph(
        module, [ExportInput(LATENTS, example, LATENT_AXES)], {"image": picture_axes(pipe)}, half=False
    )
    fold_shapes(graph)
    engine = OnnxRuntimeEngine(save_stored(graph, tmp_path / "decoder.onnx", module))
    assert [item.dim_param or item.dim_value for item in graph.graph.output[0].type.tensor_type.shape.dim] == [
        "batch", 3, "2*height", "2*width",
    ]  # fmt: skip
    for height, width in ((5, 4), (16, 24), (7, 3)):
        latents = torch.randn(2, 4, height, width)
        with torch.inference_mode():
            if family is SD3:
                decoded = latents / config.scaling_factor + config.shift_factor
            elif family is UNET_SDXL and config.latents_std is not None:
                mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (MEAN, STD))
                decoded = latents * std / config.scaling_factor + mean
            else:
                decoded = latents / config.scaling_factor
            expected = VaeImageProcessor().postprocess(pipe.vae.decode(decoded, return_dict=False)[0], output_type="np")
            eager = module(latents).numpy()
        assert expected.shape == (2, 2 * height, 2 * width, 3)
        for drawn in (eager, engine.run({LATENTS: latents.numpy()})["image"]):
            picture = np.clip(drawn, 0, 1).transpose(0, 2, 3, 1)
            np.testing.assert_allclose(picture, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "family", "reason"),
    [
        (lambda: None, UNET, "its vae is None"),
        (lambda: ConsistencyDecoderVAE.__new__(ConsistencyDecoderVAE), UNET, "draws noise of its own"),
        (dc_vae, UNET, "its VAE is a AutoencoderDC, not one of AutoencoderKL, AutoencoderTiny, "),
        (lambda: AutoencoderKL(**KL), SANA_VAE, "its VAE is a AutoencoderKL, not one of AutoencoderDC"),
        (asymmetric_vae, SD3, "a AsymmetricAutoencoderKL, has no shift_factor, which the pipeline reads"),
        (lambda: AutoencoderKL(**{**KL, "shift_factor": None}), SD3, "has no shift_factor"),
        (
            lambda: AutoencoderKL(**KL, latent_channels=8),
            UNET,
            "takes latents of 8 channels, and the denoiser's have 4",
        ),
        (
            lambda: AutoencoderKL(**KL, latents_mean=MEAN, latents_std=STD[:3]),
            UNET_SDXL,
            "latents_mean and latents_std of [3, 4] channels, and latents have 4",
        ),
    ],
)
def test_vaes_that_are_decoded_otherwise_are_refused_by_name(
    make: Callable[[], torch.nn.Module | None], family: Any, reason: str
) -> None:
    refused = vae_refusal(vae_pipe(make()), family)
    assert refused is not None
    assert reason in refused
    assert "\n" not in refused
