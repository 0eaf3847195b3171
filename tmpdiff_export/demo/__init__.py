"""The embedded demo: a small trained text-to-image pipeline, its world of drawn scenes, and the check of its pictures.

`pipeline_folder()` is the pipeline, saved by `tools/demo/train_pipeline.py`; `scenes` holds captions, `drawing` the
pictures that go with them, `readback` reads shapes, colours and positions from pixels.
"""

from pathlib import Path

__all__ = ["pipeline_folder"]


def pipeline_folder() -> Path:
    """Returns the folder of the embedded diffusers pipeline, as `DiffusionPipeline.from_pretrained` takes it."""
    return Path(__file__).parent / "pipeline"
