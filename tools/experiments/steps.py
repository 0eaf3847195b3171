"""Another bundle of the same engines, with the sampler table of another number of steps.

    python -m tools.experiments.steps BUNDLE PIPELINE_DIR --steps 50 --out OTHER_BUNDLE

Engines know nothing of T; only the table, and what its hash is part of, changes. `build --steps 50` would take the
ranges of activations from loops of 50 steps and compile everything again: experiments on T want the same engines.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from engines.bundle import MANIFEST_NAME, Bundle
from engines.cli import guarded
from engines.files import atomic_write_text, staged_folder
from engines.manifest import Manifest, manifest_identity
from tmpdiff_export.pipelines.load import open_pipeline
from tmpdiff_export.pipelines.scheduler_table import sampler_table
from tmpdiff_export.targets.target import file_entry


def with_steps(bundle: Bundle, pipeline: Path, num_steps: int, out: Path) -> Manifest:
    """Writes the other bundle; engines are copied, schedule and calibration are not.

    Raises:
        TmpDiffError: the bundle is damaged, `out` exists, or the pipeline cannot be loaded.
        SamplerError: no table can be made for so many steps.
    """
    files = [entry.path for entry in bundle.manifest.files()]
    bundle.verify(bundle.manifest.files())
    sampling = bundle.manifest.sampling
    with staged_folder(out, replace=False) as folder:
        source = open_pipeline(
            pipeline, height=sampling.height, width=sampling.width, guidance_scale=sampling.guidance_scale
        )
        table = sampler_table(source.pipe.scheduler, num_steps, **source.sampler_options(num_steps))
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.folder / name, folder / name)
        path = folder / bundle.manifest.sampler.path
        atomic_write_text(path, table.to_json())
        data = bundle.manifest.model_dump(mode="json")
        data["sampling"] |= {"num_inference_steps": num_steps, "num_steps": table.num_steps}
        data["sampler"] = file_entry(folder, path).model_dump(mode="json")
        data["bundle_id"] = manifest_identity(data)
        manifest = Manifest.model_validate_json(json.dumps(data))
        atomic_write_text(folder / MANIFEST_NAME, manifest.model_dump_json(indent=1) + "\n")
    return manifest


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.experiments.steps", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("pipeline", type=Path, metavar="PIPELINE_DIR", help="what the bundle was built from")
    parser.add_argument("--steps", type=int, required=True, metavar="N", help="num_inference_steps")
    parser.add_argument("--out", type=Path, required=True, metavar="OTHER_BUNDLE")
    args = parser.parse_args(arguments)

    def run() -> int:
        with_steps(Bundle.open(args.bundle), args.pipeline, args.steps, args.out)
        return 0

    return guarded("steps", run)


if __name__ == "__main__":
    sys.exit(main())
