"""Trains a small text-to-image pipeline on drawn scenes and saves it as a diffusers folder.

    python -m tools.demo.train_pipeline --out FOLDER --seed 0
    python -m tools.demo.train_pipeline --family unet --out FOLDER
    python -m tools.demo.train_pipeline --family mmdit --out FOLDER
    python -m tools.demo.train_pipeline --family sana --out FOLDER
    torchrun --nproc-per-node 2 -m tools.demo.train_pipeline --family mmdit --size 512 --denoiser-batch 128 \\
        --scenes 40000 --text-iterations 1000 --minutes 8 --evaluation-captions 16 --out FOLDER

from the project's root, in an environment with torch, diffusers, transformers and scikit-image. The first trains the
embedded demo pipeline, a PixArt-Sigma, from nothing; the others train a Stable Diffusion (UNet, v-prediction, DDIM) and
a Stable Diffusion 3 (MMDiT, flow matching) around the autoencoder of the embedded pipeline, and a Sana (Gemma-2, flow
matching) around one of its own, an AutoencoderDC. It draws scenes, trains the
autoencoder on their pictures where it is not given, teaches the text encoders which words belong together, trains text
encoders and denoiser together on the pictures' latents, writes everything as fp16 safetensors, loads it again as any
user would, and prints how well shapes, colours and positions of held-out captions can be read back from the pictures.
The same seed gives the same scenes, captions and iteration counts; rounding on a GPU still makes two trainings differ,
and so does a limit in minutes.

The last one trains an MMDiT of 445 M parameters for pictures of 512 pixels on two GPUs (or, without `torchrun`, on
one): first on pictures of 256 pixels, where most is learnt in less time, then on large ones, a quarter as many at once.
SIGTERM ends a training early; what it has is saved.

Where one run may not last that long, the autoencoder can be trained in a run of its own:

    python -m tools.demo.train_pipeline --out FOLDER --vae-out VAE
    python -m tools.demo.train_pipeline --out FOLDER --vae VAE

The defaults are meant for one large GPU. On a CPU, pictures of 128 pixels and a limit in minutes keep it affordable;
how far that gets is what the read-back at the end says:

    python -m tools.demo.train_pipeline --family unet --size 128 --device cpu --threads 1 --scenes 8000 \\
        --denoiser-batch 32 --text-iterations 300 --minutes 25 --save-minutes 5 --evaluation-captions 16 --out FOLDER
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import signal
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from engines.files import staged_folder
from tmpdiff_export.demo import pipeline_folder
from tmpdiff_export.demo.drawing import place
from tmpdiff_export.demo.readback import score
from tmpdiff_export.demo.scenes import IMAGE_SIZE, training_captions, write_caption
from tools.demo.autoencoders import Autoencoder, make_deep_vae, make_vae
from tools.demo.evaluation import evaluate, full_size, percent
from tools.demo.families import (
    DemoFamily,
    make_mmdit_family,
    make_pixart_family,
    make_sana_family,
    make_unet_family,
)
from tools.demo.parallel import first, join
from tools.demo.training import (
    STOP,
    DenoiserTraining,
    encode,
    pretrain_text_encoders,
    reconstruct,
    smaller_latents,
    train_denoiser,
    train_vae,
)

CAPTIONS_PER_SCENE = 3
LARGE = 512
SMALL_SHARE = 0.45
"""Of the time for the denoiser of large pictures, on smaller ones."""


def train(options: argparse.Namespace) -> DemoFamily | None:
    """Trains all parts and saves the pipeline; returns what was trained, None if that was the autoencoder only."""
    device, rank = join(options.device)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = not options.vae  # trying algorithms pays where the autoencoder is trained
    drawn = training_captions(options.scenes, CAPTIONS_PER_SCENE, options.seed)
    arrays = {
        name: torch.as_tensor(array, device=device)
        for name, array in place([scene for scene, _ in drawn], options.seed).items()
    }
    _report("scenes and captions drawn", options)

    make_autoencoder = make_deep_vae if options.family == "sana" else make_vae
    if options.vae:
        vae = make_autoencoder().to(device).eval().requires_grad_(False)
        trained = type(vae).from_pretrained(options.vae, torch_dtype=torch.float32)
        vae.load_state_dict(trained.state_dict())
        vae.register_to_config(scaling_factor=trained.config.scaling_factor)
    else:
        vae = make_autoencoder().to(device)
        share = 1.0 if options.vae_out else 0.3
        train_vae(vae, arrays, options.vae_iterations, options.vae_batch, share * _left_s(options))
    pictures, psnr_db = reconstruct(vae, arrays, min(256, options.scenes), options.size)
    right = score(full_size(pictures), [write_caption(scene) for scene, _ in drawn[: len(pictures)]])
    _report(f"autoencoder: reconstruction PSNR {psnr_db:.1f} dB, read back {percent(right)}", options)
    if options.vae_out:
        vae.save_pretrained(options.vae_out)
        return None
    latents = {}
    for side in (IMAGE_SIZE, LARGE) if options.size == LARGE else (options.size,):
        latents[side] = encode(vae, arrays, options.scenes, side) * vae.config.scaling_factor
        found = f"deviation {latents[side].float().std():.3f}, extreme {latents[side].abs().amax().item():.1f}"
        _report(f"{options.scenes} latents of {side} pixels encoded, {found}", options)

    family = make_family(options, device)
    vae = vae.to(memory_format=torch.contiguous_format)
    if options.family == "mmdit":
        vae.register_to_config(shift_factor=0.0)  # its pipeline adds one
    ids = caption_ids(family, [caption for _, captions in drawn for caption in captions])
    torch.manual_seed(options.seed + rank)
    pretrain_text_encoders(family, ids, options.text_iterations, 512)
    _report("text encoder pretrained", options)
    ids = ids.reshape(options.scenes, CAPTIONS_PER_SCENE, -1)
    for side in latents:
        smaller = side < options.size
        plan = DenoiserTraining(
            options.denoiser_iterations,
            options.denoiser_batch if smaller or options.size < LARGE else max(1, options.denoiser_batch // 4),
            _left_s(options) * (SMALL_SHARE if smaller else 1.0),
            rate=3.5e-4 if options.size == LARGE else 7e-4,
            save=(lambda: None) if smaller else (lambda: save(family, vae, options)),
            save_every_s=60 * options.save_minutes,
        )
        with smaller_latents(family.denoiser, latents[side].shape[-1]) if smaller else nullcontext():
            train_denoiser(family, latents[side], ids, caption_ids(family, [""])[0], plan)
        _report(f"text encoder and denoiser trained on {side} pixels", options)
    return family


def make_family(options: argparse.Namespace, device: torch.device) -> DemoFamily:
    """Returns the untrained parts of the family that the command line names, on a device."""
    if options.family == "pixart":
        return make_pixart_family(device)
    makers = {"unet": make_unet_family, "mmdit": make_mmdit_family, "sana": make_sana_family}
    return makers[options.family](device, options.size)


def caption_ids(family: DemoFamily, captions: Sequence[str]) -> np.ndarray:
    """Returns the padded token ids [n, caption_tokens], int16, of captions of the grammar."""
    rows = family.token_ids(captions)
    if max(map(len, rows)) > family.caption_tokens:
        raise RuntimeError(f"a training caption has more than {family.caption_tokens} tokens; raise that number")
    ids = np.array(rows, dtype=np.int16)
    if not family.causal and (ids == family.tokenizer.unk_token_id).any():  # CLIP's tokenizer knows every byte
        raise RuntimeError("a training caption has a word outside the vocabulary; add it to scenes.vocabulary()")
    return ids


def save(family: DemoFamily, vae: Autoencoder, options: argparse.Namespace) -> None:
    """Writes a copy of the pipeline as it stands as fp16 safetensors; replaces what an earlier call wrote.

    Of several processes only the first one does. transformers 5 writes a word-level tokenizer's class as one that transformers 4 lacks; the folder names the one that
    both have.
    """
    if not first():
        return
    pipeline = family.assemble(vae)
    components = {
        name: copy.deepcopy(part).to("cpu", torch.float16) if isinstance(part, torch.nn.Module) else part
        for name, part in pipeline.components.items()
    }
    if "safety_checker" in components:
        components["requires_safety_checker"] = False
    with staged_folder(options.out, replace=True) as folder:
        type(pipeline)(**components).save_pretrained(folder, safe_serialization=True)
        if options.family in ("pixart", "sana"):
            for name, key, value in (
                ("model_index.json", "tokenizer", ["transformers", "PreTrainedTokenizerFast"]),
                ("tokenizer/tokenizer_config.json", "tokenizer_class", "PreTrainedTokenizerFast"),
            ):
                document = json.loads((folder / name).read_text())
                document[key] = value
                (folder / name).write_text(json.dumps(document, indent=2) + "\n")
    _report(f"saved to {options.out}", options)


def _left_s(options: argparse.Namespace) -> float:
    return 60 * options.minutes - (time.perf_counter() - options.start)


def _report(done: str, options: argparse.Namespace) -> None:
    print(f"[{time.perf_counter() - options.start:.0f} s] {done}", flush=True)


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write the pipeline to; replaced if it exists"
    )
    parser.add_argument("--family", choices=("pixart", "unet", "mmdit", "sana"), default="pixart")
    parser.add_argument(
        "--size", type=int, choices=(LARGE, 256, 128), default=256, help="side of the pictures; pixart: 256, 512: mmdit"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: all)")
    parser.add_argument("--scenes", type=int, default=160_000, help="training scenes in the bank")
    parser.add_argument("--vae-iterations", type=int, default=4292)
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument(
        "--vae",
        type=Path,
        help="take this trained autoencoder instead of training one (default for unet, mmdit: the embedded one)",
    )
    parser.add_argument("--vae-out", type=Path, help="train the autoencoder only, and save it here")
    parser.add_argument("--text-iterations", type=int, default=2000)
    parser.add_argument("--denoiser-iterations", type=int, default=9660)
    parser.add_argument("--denoiser-batch", type=int, default=256, help="scenes at once, of every process")
    parser.add_argument("--minutes", type=float, default=math.inf, help="do fewer iterations to end in this time")
    parser.add_argument("--save-minutes", type=float, default=math.inf, help="save this often on the way, too")
    parser.add_argument("--evaluation-captions", type=int, default=70, help="held-out captions of each kind")
    parser.add_argument("--contact-sheet", type=Path, help="PNG to write pictures of held-out captions to")
    options = parser.parse_args()
    if options.family == "pixart" and options.size != 256:
        parser.error(f"--size {options.size} is for the families unet, mmdit and sana; pixart draws 256 x 256 pictures")
    if options.size == LARGE and options.family != "mmdit":
        parser.error(f"--size {LARGE} is for the family mmdit, not for {options.family}")
    if options.family in ("unet", "mmdit"):
        if options.vae_out:
            parser.error(
                "--vae-out is for the families pixart and sana; unet and mmdit take a trained autoencoder (--vae)"
            )
        options.vae = options.vae or pipeline_folder() / "vae"
    return options


def main() -> None:
    """Parses the command line, trains, saves and evaluates."""
    options = parse_options()
    options.start = time.perf_counter()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    if options.threads:
        torch.set_num_threads(options.threads)

    signal.signal(signal.SIGTERM, lambda *_: STOP.set())
    family = train(options)
    if family is None or not first():
        return
    size = sum(f.stat().st_size for f in options.out.rglob("*") if f.is_file())
    parameters = sum(p.numel() for p in family.denoiser.parameters())
    _report(f"{size / 1e6:.1f} MB in {options.out}, denoiser of {parameters / 1e6:.2f} M parameters", options)
    evaluate(family, options)
    _report("done", options)


if __name__ == "__main__":
    main()
