"""Writes an untrained PixArt pipeline of any size: for timing where quality does not matter.

    python -m tools.acceptance.random_pipeline DIR [--heads 16] [--head-size 64] [--layers 8] [--latent-side 64]

Text encoder and VAE are small; the VAE draws 4 pixels per latent. Weights are those of a fixed seed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engines.cli import guarded


def save_random_pipeline(
    folder: Path, tokenizer: Path, *, heads: int, head_size: int, layers: int, latent_side: int
) -> None:
    """Writes a PixArtSigmaPipeline.

    Args:
        folder: pipeline folder to make.
        tokenizer: a saved tokenizer to use.
        heads: attention heads of the denoiser.
        head_size: width of a head; its width is heads times this, a multiple of 16.
        layers: blocks of the denoiser.
        latent_side: height and width of the latents; a token has 2 x 2 of them.
    """
    import torch
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    denoiser = PixArtTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=head_size, num_layers=layers, sample_size=latent_side, patch_size=2,
        in_channels=4, out_channels=8, cross_attention_dim=heads * head_size, caption_channels=128,
        use_additional_conditions=False,
    )  # fmt: skip
    with torch.no_grad():  # as trained ones have it; the initial value makes the output nearly independent of the step
        denoiser.scale_shift_table.normal_()
        for block in denoiser.transformer_blocks:
            block.scale_shift_table.normal_()
    text = T5Config(vocab_size=64, d_model=128, d_kv=32, d_ff=128, num_layers=1, num_heads=2, dropout_rate=0.0)
    vae = AutoencoderKL(
        latent_channels=4, block_out_channels=(16, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=8, sample_size=4 * latent_side,
    )  # fmt: skip
    PixArtSigmaPipeline(
        tokenizer=PreTrainedTokenizerFast.from_pretrained(tokenizer),
        text_encoder=T5EncoderModel(text),
        vae=vae,
        transformer=denoiser,
        scheduler=DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    ).save_pretrained(folder)


def main() -> int:
    """Runs the command."""
    from tmpdiff_export.demo import pipeline_folder

    parser = argparse.ArgumentParser(
        prog="python -m tools.acceptance.random_pipeline", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="pipeline folder to make")
    for name, default in (("heads", 16), ("head-size", 64), ("layers", 8), ("latent-side", 64)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")
    args = parser.parse_args()
    save_random_pipeline(
        args.folder,
        pipeline_folder() / "tokenizer",
        heads=args.heads,
        head_size=args.head_size,
        layers=args.layers,
        latent_side=args.latent_side,
    )
    return 0


if __name__ == "__main__":
    sys.exit(guarded("random_pipeline", main))
