"""Trains the embedded demo pipeline from nothing on one GPU and saves it as a diffusers folder.

    python -m tools.train_demo_pipeline --out FOLDER --seed 0

from the project's root, in an environment with torch, diffusers, transformers and scikit-image. It draws scenes,
trains the autoencoder on their pictures, teaches the text encoder which words belong together, trains text encoder
and denoiser together on the pictures' latents, writes everything as fp16 safetensors, loads it again as any user
would, and prints how well shapes, colours and positions of held-out captions can be read back from the pictures. The
same seed gives the same scenes, captions and iteration counts; rounding on a GPU still makes two trainings differ.

Where one run may not last that long, the autoencoder can be trained in a run of its own:

    python -m tools.train_demo_pipeline --out FOLDER --vae-out VAE
    python -m tools.train_demo_pipeline --out FOLDER --vae VAE
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DPMSolverMultistepScheduler, PixArtSigmaPipeline
from PIL import Image

from tmpdiff_export.demo.drawing import place
from tmpdiff_export.demo.readback import score
from tmpdiff_export.demo.scenes import held_out_captions, training_captions, write_caption
from tools.demo_networks import CAPTION_TOKENS, make_denoiser, make_text_encoder, make_tokenizer, make_vae
from tools.demo_training import encode, pretrain_text_encoder, reconstruct, train_denoiser, train_vae

CAPTIONS_PER_SCENE = 3
STEPS = 20
FLOW_SHIFT = 3.0
GUIDANCE_SCALE = 4.5


def make_scheduler(flow_shift: float) -> DPMSolverMultistepScheduler:
    """Returns DPM-Solver++ (2M) for a denoiser that predicts velocity, with the given shift of its sigmas."""
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift, solver_order=2
    )


def train(options: argparse.Namespace) -> PixArtSigmaPipeline | None:
    """Trains all parts and returns the pipeline, in fp32 on the CPU; None if only the autoencoder was asked for."""
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    drawn = training_captions(options.scenes, CAPTIONS_PER_SCENE, options.seed)
    arrays = {
        name: torch.as_tensor(array, device=device)
        for name, array in place([scene for scene, _ in drawn], options.seed).items()
    }
    tokenizer = make_tokenizer()
    ids = np.array(
        tokenizer([c for _, captions in drawn for c in captions], padding="max_length", max_length=CAPTION_TOKENS)[
            "input_ids"
        ],
        dtype=np.int16,
    ).reshape(options.scenes, CAPTIONS_PER_SCENE, CAPTION_TOKENS)
    if (ids == tokenizer.unk_token_id).any():
        raise RuntimeError("a training caption has a word outside the vocabulary; add it to scenes.vocabulary()")
    empty = np.array(tokenizer("", padding="max_length", max_length=CAPTION_TOKENS)["input_ids"], dtype=np.int16)
    _report("scenes and captions drawn", options)

    if options.vae:
        trained = AutoencoderKL.from_pretrained(options.vae, torch_dtype=torch.float32)
        vae = make_vae().to(device).eval().requires_grad_(False)
        vae.load_state_dict(trained.state_dict())
        vae.register_to_config(scaling_factor=trained.config.scaling_factor)
    else:
        vae = make_vae().to(device)
        left_s = 60 * options.minutes - (time.perf_counter() - options.start)
        share = 1.0 if options.vae_out else 0.3
        train_vae(vae, arrays, options.vae_iterations, options.vae_batch, share * left_s)
        pictures, psnr_db = reconstruct(vae, arrays, min(256, options.scenes))
        right = score(pictures, [write_caption(scene) for scene, _ in drawn[: len(pictures)]])
        _report(f"autoencoder: reconstruction PSNR {psnr_db:.1f} dB, read back {_percent(right)}", options)
    if options.vae_out:
        vae.save_pretrained(options.vae_out)
        return None
    latents = encode(vae, arrays, options.scenes) * vae.config.scaling_factor
    extreme = latents.abs().amax().item()
    _report(f"{options.scenes} latents encoded, deviation {latents.float().std():.3f}, extreme {extreme:.1f}", options)

    text_encoder = make_text_encoder(len(tokenizer)).to(device)
    pretrain_text_encoder(
        text_encoder, ids.reshape(-1, CAPTION_TOKENS), tokenizer.get_vocab(), options.text_iterations, 512
    )
    _report("text encoder pretrained", options)
    denoiser = make_denoiser().to(device)
    left_s = 60 * options.minutes - (time.perf_counter() - options.start)
    train_denoiser(
        denoiser, text_encoder, latents, ids, empty, options.denoiser_iterations, options.denoiser_batch, left_s
    )
    _report("text encoder and denoiser trained", options)
    return PixArtSigmaPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae.to(memory_format=torch.contiguous_format),
        transformer=denoiser, scheduler=make_scheduler(FLOW_SHIFT),
    ).to("cpu")  # fmt: skip


def generate(pipeline: DiffusionPipeline, captions: list[str], guidance_scale: float, seed: int) -> list[np.ndarray]:
    """Returns one picture [256, 256, 3] uint8 for each caption, in batches of 100; picture i starts from seed + i."""
    pictures: list[np.ndarray] = []
    for start in range(0, len(captions), 100):
        part = captions[start : start + 100]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        output = pipeline(
            part, num_inference_steps=STEPS, guidance_scale=guidance_scale, generator=generators,
            max_sequence_length=CAPTION_TOKENS, clean_caption=False,
        )  # fmt: skip
        pictures += [np.asarray(image) for image in output.images]
    return pictures


def evaluate(folder: Path, options: argparse.Namespace) -> None:
    """Loads the saved folder in fp16, prints read-back accuracies, and saves a sheet of held-out scenes."""
    dtype = torch.float16 if options.device == "cuda" else torch.float32
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    kinds = ("plain", "composed", "unusual")
    captions = {kind: held_out_captions(kind, options.evaluation_captions, options.seed) for kind in kinds}
    for flow_shift in (3.0, 1.5):
        for guidance_scale in (4.5, 3.0):
            pipeline.scheduler = make_scheduler(flow_shift)
            pictures = generate(pipeline, [c for kind in kinds for c in captions[kind]], guidance_scale, options.seed)
            print(f"flow_shift {flow_shift} guidance_scale {guidance_scale}, {STEPS} steps", flush=True)
            for k, kind in enumerate(kinds):
                own = pictures[k * options.evaluation_captions : (k + 1) * options.evaluation_captions]
                accuracies = score(own, captions[kind])
                print(f"  {kind}: {_percent(accuracies)}", flush=True)
            if (flow_shift, guidance_scale) == (FLOW_SHIFT, GUIDANCE_SCALE) and options.contact_sheet:
                shown = np.stack(pictures)[np.linspace(0, len(pictures) - 1, 48).astype(int)]
                rows = [np.concatenate(list(row), axis=1) for row in shown.reshape(6, 8, *shown.shape[1:])]
                Image.fromarray(np.concatenate(rows)).save(options.contact_sheet)


def save(pipeline: PixArtSigmaPipeline, folder: Path) -> None:
    """Writes the pipeline as fp16 safetensors.

    transformers 5 writes a tokenizer class that transformers 4 lacks; the folder names the one that both have.
    """
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    for name, key, value in (
        ("model_index.json", "tokenizer", ["transformers", "PreTrainedTokenizerFast"]),
        ("tokenizer/tokenizer_config.json", "tokenizer_class", "PreTrainedTokenizerFast"),
    ):
        document = json.loads((folder / name).read_text())
        document[key] = value
        (folder / name).write_text(json.dumps(document, indent=2) + "\n")


def _percent(accuracies: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1%}" for name, value in accuracies.items())


def _report(done: str, options: argparse.Namespace) -> None:
    print(f"[{time.perf_counter() - options.start:.0f} s] {done}", flush=True)


def main() -> None:
    """Parses the command line, trains, saves and evaluates."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the pipeline to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is for trying the script out")
    parser.add_argument("--scenes", type=int, default=160_000, help="training scenes in the bank")
    parser.add_argument("--vae-iterations", type=int, default=4292)
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--vae", type=Path, help="take this trained autoencoder instead of training one")
    parser.add_argument("--vae-out", type=Path, help="train the autoencoder only, and save it here")
    parser.add_argument("--text-iterations", type=int, default=2000)
    parser.add_argument("--denoiser-iterations", type=int, default=9660)
    parser.add_argument("--denoiser-batch", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=math.inf, help="do fewer iterations to end in this time")
    parser.add_argument("--evaluation-captions", type=int, default=70, help="held-out captions of each kind")
    parser.add_argument("--contact-sheet", type=Path, help="PNG to write pictures of held-out captions to")
    options = parser.parse_args()
    options.start = time.perf_counter()
    logging.getLogger("diffusers").setLevel(logging.ERROR)

    pipeline = train(options)
    if pipeline is None:
        return
    save(pipeline, options.out)
    size = sum(f.stat().st_size for f in options.out.rglob("*") if f.is_file())
    parameters = sum(p.numel() for p in pipeline.transformer.parameters())
    _report(f"saved {size / 1e6:.1f} MB to {options.out}, denoiser of {parameters / 1e6:.2f} M parameters", options)
    evaluate(options.out, options)
    _report("done", options)


if __name__ == "__main__":
    main()
