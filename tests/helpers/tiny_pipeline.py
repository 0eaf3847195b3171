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
    from tools.acceptance.random_pipeline import save_random_pipeline

    save_random_pipeline(folder, tokenizer, heads=4, head_size=32, layers=2, latent_side=16)
