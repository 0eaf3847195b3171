"""Does a TensorRT-family builder take an exported ONNX file? Needs no GPU.

    python tools/acceptance/accept_onnx.py --bindings FOLDER --arch sm89 --arch sm120 FILE.onnx ... [--json OUT.json]

The builder is that of TensorRT for RTX, which compiles for a named architecture and whose Python API is
TensorRT's, so our own build code drives it: parser, profile, configuration and build are those of
`tmpdiff-export build --backend tensorrt`. FOLDER is what tools/release/fetch_bindings.py made. Prints a line
per file and architecture; exit status 0 when all are accepted.

What an acceptance says: the parser knows every operator, the types fit, and the builder finds an
implementation for the whole graph on that architecture. It says nothing of speed or numerics, and
TensorRT itself was not asked: it takes more architectures, and may differ in detail.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from engines.backends.tensorrt.options import PlanOptions
from engines.backends.tensorrt.profiles import ShapeRange, profile, symbols_of
from engines.errors import TmpDiffError
from engines.files import atomic_write_text, sha256_file
from tmpdiff_export.targets.target import tensor_specs

ARCHITECTURES = ("sm86", "sm89", "sm120", "sm121")
AS_TENSORRT = "11.4.0.106"  # whose API the builder's is nearest to; Polygraphy looks at the version
# Of symbolic axes; latents of the graphs of `export_families` have up to 32 rows and columns, in twos.
SIZES = {"height": ShapeRange(8, 16, 32), "width": ShapeRange(8, 16, 32)}
OTHER_SIZES = ShapeRange(1, 2, 8)


def main() -> int:
    """Returns 0 when every file is accepted for every architecture, else 1."""
    parser = argparse.ArgumentParser(description="Does a TensorRT-family builder take an ONNX file?")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.onnx")
    parser.add_argument(
        "--bindings", type=Path, required=True, metavar="FOLDER", help="made by tools/release/fetch_bindings.py"
    )
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="may be repeated (default sm89)")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write the verdicts there")
    args = parser.parse_args()
    build, version = open_builder(args.bindings)
    rows = []
    for path in args.files:
        for architecture in args.arch or ["sm89"]:
            verdict = judge(build, path, architecture)
            print(f"{path.name} {architecture}: {verdict}", flush=True)
            rows.append(
                {
                    "file": f"{path.absolute().parent.name}/{path.name}",
                    "sha256": sha256_file(path),
                    "bytes": path.stat().st_size,
                    "architecture": architecture,
                    "verdict": verdict,
                }
            )
    if args.json is not None:
        document = {"judge": f"builder of TensorRT for RTX {version}", "rows": rows}
        atomic_write_text(args.json, json.dumps(document, indent=1) + "\n")
    return 0 if all(row["verdict"] == "accepted" for row in rows) else 1


def open_builder(bindings: Path) -> tuple[Callable[[Path, str], None], str]:
    """Our build code on that builder: a function of file and architecture, and the builder's version."""
    folders = sorted(bindings.glob("rtx-*"))
    if not folders:
        raise SystemExit(
            f"{bindings} holds no rtx-* folder; make it with: python tools/release/fetch_bindings.py --into {bindings}"
        )
    sys.path.insert(0, str(folders[-1]))
    import tensorrt_rtx as rtx

    version = str(rtx.__version__)
    rtx.__version__ = AS_TENSORRT
    sys.modules["tensorrt"] = rtx
    from engines.backends.tensorrt.builder import serialized_plan

    create = rtx.Builder.create_builder_config

    def build(path: Path, architecture: str) -> None:
        def for_architecture(builder: Any) -> Any:
            config = create(builder)
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(rtx.ComputeCapability, architecture.upper()), 0)
            return config

        rtx.Builder.create_builder_config = for_architecture
        specs = tensor_specs(onnx.load(path, load_external_data=False).graph.input)
        shapes = profile(specs, {symbol: SIZES.get(symbol, OTHER_SIZES) for symbol in symbols_of(specs)})
        with tempfile.TemporaryDirectory() as scratch:
            serialized_plan(path, (shapes,), PlanOptions(), Path(scratch) / "timing.cache", None)

    return build, version


def judge(build: Callable[[Path, str], None], path: Path, architecture: str) -> str:
    """ "accepted", or the builder's words."""
    try:
        build(path, architecture)
    except TmpDiffError as error:
        return f"refused: {error}"
    return "accepted"


if __name__ == "__main__":
    sys.exit(main())
