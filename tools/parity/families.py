"""What is tried of every family: the small pipeline, and the values of each axis, the default one first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tools.acceptance.odd_prompts import NEGATIVES, ODD_PROMPTS

ScaledLinear = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FlowPrediction = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@dataclass(frozen=True)
class Scheduler:
    """A diffusers scheduler.

    Attributes:
        kind: class name.
        config: arguments of its constructor.
    """

    kind: str
    config: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Any:
        """A new one."""
        import diffusers

        return getattr(diffusers, self.kind)(**self.config)


NOISE_SCHEDULERS: Final = {
    "DDIM": Scheduler("DDIMScheduler", {**ScaledLinear, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "Euler": Scheduler("EulerDiscreteScheduler", ScaledLinear),
    "DPM-Solver++ 2M Karras": Scheduler("DPMSolverMultistepScheduler", {**ScaledLinear, "use_karras_sigmas": True}),
    "UniPC": Scheduler("UniPCMultistepScheduler", ScaledLinear),
    "Heun": Scheduler("HeunDiscreteScheduler", ScaledLinear),
    "DDIM, trailing, v-prediction": Scheduler(
        "DDIMScheduler", {**ScaledLinear, "prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": False}
    ),
    "PNDM": Scheduler("PNDMScheduler", {**ScaledLinear, "skip_prk_steps": True, "steps_offset": 1}),
    "Euler, trailing, zero SNR": Scheduler(
        "EulerDiscreteScheduler", {**ScaledLinear, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    ),
}  # fmt: skip
FLOW_SCHEDULERS: Final = {
    "flow Euler": Scheduler("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow Euler, dynamic shifting": Scheduler("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    "flow Euler, Karras": Scheduler("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "flow DPM-Solver++ 2M": Scheduler("DPMSolverMultistepScheduler", {**FlowPrediction, "flow_shift": 3.0}),
    "flow UniPC": Scheduler("UniPCMultistepScheduler", {**FlowPrediction, "flow_shift": 3.0}),
}


@dataclass(frozen=True, kw_only=True)
class ParityFamily:
    """A family, and what is tried of it.

    Attributes:
        title: for the table.
        maker: key in `tools.acceptance.text_pipelines.TEXT_PIPELINES`.
        sizes: (height, width) in pixels; engines are built for the first two, settings added for the others.
        schedulers: by what the table calls them; the first is the pipeline's own.
        text_lengths: of the build; None where it cannot vary.
        guidance_scales: None for the pipeline's own.
        guidance_rescales: of the call, where it has one.
        clip_skips: a bundle each.
        negatives: keys of `NEGATIVES`.
        call_options: further arguments of the pipeline's call.
        packed: whether the pipeline returns latents as tokens.
    """

    title: str
    maker: str
    sizes: tuple[tuple[int, int], ...]
    schedulers: Mapping[str, Scheduler]
    text_lengths: tuple[int | None, ...] = (None,)
    guidance_scales: tuple[float | None, ...] = (None, 1.0, 2.5)
    guidance_rescales: tuple[float, ...] = (0.0,)
    clip_skips: tuple[int | None, ...] = (None,)
    negatives: tuple[str, ...] = tuple(NEGATIVES)
    call_options: Mapping[str, Any] = field(default_factory=dict)
    packed: bool = False

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """Values by the attribute of `Cell`, the default first."""
        return {
            "size": self.sizes,
            "text_length": self.text_lengths,
            "scheduler": tuple(self.schedulers),
            "steps": (6, 2, 15),
            "prompt": tuple(ODD_PROMPTS),
            "negative": self.negatives,
            "guidance_scale": self.guidance_scales,
            "guidance_rescale": self.guidance_rescales,
            "clip_skip": self.clip_skips,
            "batch": (1, 2),
            "attached": (False, True),
        }


UNET_SIZES = ((64, 64), (96, 64), (64, 128), (72, 88))
PATCHED_SIZES = ((64, 64), (96, 64), (48, 128), (80, 112))
FLUX: dict[str, Any] = {
    "sizes": PATCHED_SIZES,
    "schedulers": {
        "flow Euler, dynamic shifting": FLOW_SCHEDULERS["flow Euler, dynamic shifting"],
        "flow Euler": FLOW_SCHEDULERS["flow Euler"],
        "flow Euler, Karras": FLOW_SCHEDULERS["flow Euler, Karras"],
        # The pipeline hands every scheduler a shift, which these take with dynamic shifting only.
        "flow DPM-Solver++ 2M": Scheduler(
            "DPMSolverMultistepScheduler", {**FlowPrediction, "use_dynamic_shifting": True}
        ),
        "flow UniPC": Scheduler("UniPCMultistepScheduler", {**FlowPrediction, "use_dynamic_shifting": True}),
    },
    "text_lengths": (128, 512),
    "negatives": ("absent",),
    "packed": True,
}
UNCHANGED = {"use_resolution_binning": False, "clean_caption": False}
PIXART: dict[str, Any] = {
    "schedulers": {name: NOISE_SCHEDULERS[name] for name in ("DPM-Solver++ 2M Karras", *NOISE_SCHEDULERS)},
    "text_lengths": (120, 40),
    "call_options": UNCHANGED,
}
FAMILIES: Final = {
    "sd": ParityFamily(
        title="Stable Diffusion, with textual inversions", maker="sd-inversion", sizes=UNET_SIZES,
        schedulers=NOISE_SCHEDULERS, guidance_rescales=(0.0, 0.7), clip_skips=(None, 1),
    ),
    "sdxl": ParityFamily(
        title="SDXL, two tokenizers that pad differently", maker="sdxl", sizes=UNET_SIZES,
        schedulers={name: NOISE_SCHEDULERS[name] for name in ("Euler", *NOISE_SCHEDULERS)},
        guidance_rescales=(0.0, 0.7), clip_skips=(None, 1),
    ),
    "sdxl-no-zeros": ParityFamily(
        title="SDXL, absent negative prompts encoded", maker="sdxl-no-zeros", sizes=UNET_SIZES[:2],
        schedulers={"Euler": NOISE_SCHEDULERS["Euler"]},
    ),
    "pixart": ParityFamily(
        title="PixArt-Sigma", maker="pixart", sizes=((128, 128), *PATCHED_SIZES[1:]), **PIXART,
    ),
    "pixart-alpha": ParityFamily(title="PixArt-Alpha, told the size", maker="pixart-alpha", sizes=PATCHED_SIZES, **PIXART),
    "sana": ParityFamily(
        title="Sana", maker="sana", sizes=((128, 128), (192, 128), (64, 256), (96, 160)),
        schedulers={
            name: FLOW_SCHEDULERS[name]
            for name in ("flow DPM-Solver++ 2M", "flow Euler", "flow Euler, Karras", "flow UniPC")
        },
        text_lengths=(300, 60), call_options=UNCHANGED,
    ),
    "sd3": ParityFamily(
        title="SD3 without T5", maker="sd3", sizes=PATCHED_SIZES, schedulers=FLOW_SCHEDULERS, clip_skips=(None, 1),
    ),
    "sd3-t5": ParityFamily(
        title="SD3 with T5", maker="sd3-t5", sizes=PATCHED_SIZES, schedulers=FLOW_SCHEDULERS, text_lengths=(77, 256),
    ),
    "flux": ParityFamily(title="FLUX.1, as dev", maker="flux", guidance_scales=(None, 1.0, 7.5), **FLUX),
    "flux-schnell": ParityFamily(title="FLUX.1, as schnell", maker="flux-schnell", guidance_scales=(None,), **FLUX),
}  # fmt: skip
"""By the name on the command line."""
