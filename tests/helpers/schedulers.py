"""diffusers schedulers that there are sampler tables of, and a stand-in for a denoiser to run them with."""

import diffusers
import numpy as np

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
FLOW_DPM = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}

# name: (class, configuration, set_timesteps options, largest window)
DETERMINISTIC = {
    "ddim": ("DDIM", SD | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, {}, 0),
    "ddim-zero-snr": ("DDIM", SD | ZERO_SNR | {"clip_sample": False, "timestep_spacing": "trailing"}, {}, 0),
    "euler": ("EulerDiscrete", SD, {}, 0),
    "euler-karras": ("EulerDiscrete", SD | {"use_karras_sigmas": True}, {}, 0),
    "euler-v": ("EulerDiscrete", SD | {"prediction_type": "v_prediction"}, {}, 0),
    "heun": ("HeunDiscrete", SD, {}, 1),
    "dpm++2m": ("DPMSolverMultistep", SD, {}, 1),
    "dpm++2m-karras": ("DPMSolverMultistep", SD | {"use_karras_sigmas": True}, {}, 1),
    "dpm++2m-v": ("DPMSolverMultistep", SD | {"prediction_type": "v_prediction"}, {}, 1),
    "dpm++2m-flow": ("DPMSolverMultistep", FLOW_DPM, {}, 1),
    "dpm++2m-zero-snr": ("DPMSolverMultistep", SD | {"rescale_betas_zero_snr": True}, {}, 1),
    "dpm++3m": ("DPMSolverMultistep", SD | {"solver_order": 3}, {}, 2),
    "dpm++3m-karras": ("DPMSolverMultistep", SD | {"solver_order": 3, "use_karras_sigmas": True}, {}, 2),
    "dpm++single": ("DPMSolverSinglestep", SD, {}, 1),
    "unipc": ("UniPCMultistep", SD, {}, 2),
    "unipc-3-karras": ("UniPCMultistep", SD | {"solver_order": 3, "use_karras_sigmas": True}, {}, 3),
    "unipc-flow": ("UniPCMultistep", FLOW_DPM, {}, 2),
    "lms": ("LMSDiscrete", SD, {}, 3),
    "pndm": ("PNDM", SD | {"skip_prk_steps": True}, {}, 4),
    "pndm-prk": ("PNDM", SD, {}, 12),
    "deis": ("DEISMultistep", SD, {}, 1),
    "kdpm2": ("KDPM2Discrete", SD, {}, 1),
    "ipndm": ("IPNDM", {}, {}, 3),
    "edm-dpm": ("EDMDPMSolverMultistep", {}, {}, 1),
    "flow-euler": ("FlowMatchEulerDiscrete", {"shift": 3.0}, {}, 0),
    "flow-euler-dynamic": ("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True}, {"mu": 0.8}, 0),
    "flow-heun": ("FlowMatchHeunDiscrete", {"shift": 3.0}, {}, 1),
}


def make(name, **config):
    return getattr(diffusers, f"{name}Scheduler")(**config)


def relative(got, expected):
    expected = np.asarray(expected, np.float64)
    return np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected)


def denoise(x, k):
    """A nonlinear stand-in for a denoiser that mixes neighbouring pixels and channels; float32."""
    mixed = 0.6 * np.roll(x, 1, -1) - 0.5 * np.roll(x, 1, -2) + 0.3 * np.flip(x, -3)
    return (np.sin(mixed + 0.1 * k) + 0.2 * np.tanh(x) ** 2).astype(np.float32)


def noise(shape=(2, 4, 8, 8), seed=7):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
