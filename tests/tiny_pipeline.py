"""An untrained pipeline that builds in seconds, for tests of the build rather than of pictures."""

from __future__ import annotations

from pathlib import Path

PROMPTS = ("a red circle", "a small blue square in the center", "a green triangle")


def save_tiny_pipeline(folder: Path, tokenizer: Path) -> None:
    """Writes a PixArtSigmaPipeline of 64 x 64 pictures and .5 M denoiser parameters.

    Args:
        folder: pipeline folder to make.
        tokenizer: a saved tokenizer to use.
    """
    import torch
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    denoiser = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, num_layers=2, sample_size=16, patch_size=2, in_channels=4,
        out_channels=8, cross_attention_dim=128, caption_channels=128, use_additional_conditions=False,
    )  # fmt: skip
    with torch.no_grad():  # as trained ones have it; the initial value makes the output nearly independent of the step
        denoiser.scale_shift_table.normal_()
        for block in denoiser.transformer_blocks:
            block.scale_shift_table.normal_()
    text = T5Config(vocab_size=64, d_model=128, d_kv=32, d_ff=128, num_layers=1, num_heads=2, dropout_rate=0.0)
    vae = AutoencoderKL(
        latent_channels=4, block_out_channels=(16, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=8, sample_size=64,
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
