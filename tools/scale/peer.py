"""The 16-bit denoiser of diffusers, its blocks compiled: `python -m tools.scale.peer NAME` prints its step as JSON."""

from __future__ import annotations

import argparse
import json
import sys

import torch

from engines.cli import guarded
from tools.gpu_bench.step import Step, compile_blocks
from tools.gpu_bench.timing import time_step
from tools.scale.models import PIPELINES


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m tools.scale.peer", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=sorted(PIPELINES))
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--compile-backend", default="inductor")
    parser.add_argument("--repeats", type=int, default=30, metavar="N")
    args = parser.parse_args()
    bench, device = PIPELINES[args.name].bench, torch.device(args.device)
    module = bench.build(device, tiny=args.tiny)
    blocks = compile_blocks(module, bench.blocks, args.compile_backend)
    step = Step(module, bench.input_sets(module, device, tiny=args.tiny))
    compiled_s = step.compile_now()
    if device.type == "cuda":
        step.capture()
    timed = time_step(step, None, args.repeats, 3)["step"]
    print(json.dumps({"blocks": blocks, "compile_s": compiled_s, "launch": step.launch_mode, **timed}))
    return 0


if __name__ == "__main__":
    sys.exit(guarded("scale.peer", main))
