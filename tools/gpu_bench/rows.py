"""The rows of one denoiser: how each is made, and what is measured of it."""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engines.errors import TmpDiffError
from engines.precision import Precision
from tmpdiff_export.quantization.codes import AttentionRange
from tmpdiff_export.targets.torch.attention import use_fp8_attention
from tmpdiff_export.targets.torch.fusion import fuse
from tools.gpu_bench.ceilings import floor
from tools.gpu_bench.document import error_text
from tools.gpu_bench.models import BenchModel, Inputs
from tools.gpu_bench.package import packaged
from tools.gpu_bench.peers import PEERS, quantize_with_torchao
from tools.gpu_bench.profiling import profile_step
from tools.gpu_bench.quantize import (
    choose_layers,
    quantized_linear,
    replace_layers,
    sharing_copy,
    storages,
)
from tools.gpu_bench.step import Step, compile_blocks, compiled_graphs
from tools.gpu_bench.timing import REPEATS, WARM_UPS, output_error, scratch_bytes, time_step
from tools.gpu_bench.work import Work

# As fp8 and int8, with attention in FP8 as well.
ATTENTION = {"fp8-attention": Precision.FP8, "int8-attention": Precision.INT8}
OWN = {"fp8": Precision.FP8, "int8": Precision.INT8, "int4": Precision.INT4, **ATTENTION}
SHARED = {"shared-fp8": Precision.FP8, "shared-int8": Precision.INT8}
BASELINE = "16-bit"
LOWERED = "16-bit-lowered"  # the 16-bit engine of the torch backend, where it differs from the diffusers module
# The same compiled ahead of time, as a bundle holds it, in place of block by block at the first call.
PACKAGES = {f"{row}-package": row for row in (LOWERED, *OWN)}
ROWS = (BASELINE, LOWERED, *OWN, *PEERS, *SHARED, *PACKAGES)
ALIASES = {"bf16": BASELINE, "fp16": BASELINE}


@dataclass(frozen=True)
class Setting:
    """How rows are measured.

    Attributes:
        tiny: small configuration and sizes.
        backend: of torch.compile.
        repeats: timed steps of a row.
        warm_ups: steps before them.
        torchao_recommended: torchao sets Inductor's options for its rows.
        profiled: rows whose kernels are listed.
        seconds_limit: no row is started that would end later.
    """

    tiny: bool
    backend: str
    repeats: int = REPEATS
    warm_ups: int = WARM_UPS
    torchao_recommended: bool = False
    profiled: tuple[str, ...] = ()
    seconds_limit: float = math.inf


class Bench:
    """A denoiser on the device with all that its rows need.

    Attributes:
        work: operations, and input ranges over both input sets.
        references: outputs of the eager 16-bit denoiser for the input sets.
        ceilings: as of `ceilings.measure_ceilings`.
        baseline: the compiled 16-bit step, kept so that every row is timed beside it.
    """

    def __init__(
        self,
        model: BenchModel,
        module: torch.nn.Module,
        input_sets: Sequence[Inputs],
        work: Work,
        references: Sequence[torch.Tensor],
        setting: Setting,
    ) -> None:
        self.model = model
        self.module = module
        self.input_sets = input_sets
        self.work = work
        self.references = references
        self.setting = setting
        self.ceilings: dict[str, Any] = {}
        self.baseline: Step | None = None
        self._shared_storages = storages(module)

    def make(self, row: str) -> tuple[torch.nn.Module, dict[str, Any]]:
        """The denoiser of a row, which shares all tensors that the row does not change with the 16-bit one.

        Returns:
            The module and what was quantized: `layers` (names), `kept` (numbers by reason), `kind` (whose rate its
            products can reach).
        """
        copied = sharing_copy(self.module)
        if row in (BASELINE, LOWERED):
            if row == LOWERED:
                fuse(copied, ())
            return copied, {"layers": (), "kept": {}, "kind": "16-bit"}
        precision = OWN.get(row) or SHARED.get(row) or PEERS[row][0]
        chosen = choose_layers(self.module, precision, linear_only=row in PEERS)
        kind = precision.value if row in OWN or row in PEERS else "16-bit"
        if row in PEERS:
            quantize_with_torchao(copied, row, recommended=self.setting.torchao_recommended)
        else:

            def lower(name: str, layer: torch.nn.Linear | torch.nn.Conv2d) -> torch.nn.Module:
                own = quantized_linear(layer, precision, self.work.input_amax[name], self.model.dtype)
                own.sixteen_bit = row in SHARED
                return own

            replace_layers(copied, chosen.names, lower)
            if row in ATTENTION:
                use_fp8_attention(copied, self._attention_ranges())
            fuse(copied, self.work.readers)
        return copied, {"layers": chosen.names, "kept": chosen.kept, "kind": "16-bit" if row == "int4" else kind}

    def _attention_ranges(self) -> dict[str, AttentionRange]:
        """One range for all layers: scales are constants of a compiled block, and alike blocks are compiled once.

        Raises:
            TmpDiffError: no layer's attention can be in FP8.
        """
        found = self.work.attention_amax
        if not found:
            raise TmpDiffError("no attention of this denoiser can be in FP8; leave the row out")
        return dict.fromkeys(found, functools.reduce(AttentionRange.joined, found.values()))

    def measure(self, row: str) -> dict[str, Any]:
        """Builds, compiles, captures and times a row; raises whatever goes wrong with it.

        A step that cannot be captured is timed as a stream of launches: `launch` then says "stream" and `part_errors`
        why, and the call ends with status 1.
        """
        begin = time.perf_counter()
        module, made = self.make(PACKAGES.get(row, row))
        build_s = time.perf_counter() - begin
        if row in PACKAGES:
            with packaged(row, module, self.input_sets[0], self.model.dtype) as (loaded, facts):
                del module
                release()
                step = Step(loaded, self.input_sets)
                step.compile_now()
                return self._timed(row, step, made, {"build_s": build_s, **facts})
        graphs = compiled_graphs()
        blocks = compile_blocks(module, self.model.blocks, self.setting.backend)
        step = Step(module, self.input_sets)
        compile_s = step.compile_now()
        compiled = {"compiled_blocks": blocks, "compiled_graphs": compiled_graphs() - graphs}
        return self._timed(row, step, made, {"build_s": build_s, "compile_s": compile_s, **compiled})

    def _timed(self, row: str, step: Step, made: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
        """What is measured of a compiled step, with `facts` of how it was made."""
        held = storages(step.module)
        result: dict[str, Any] = {
            "status": "ok",
            **facts,
            "quantized_layers": len(made["layers"]),
            "kept_layers": made["kept"],
            "weights_bytes": sum(held.values()),
            "own_bytes": sum(size for address, size in held.items() if address not in self._shared_storages),
            "scratch_bytes": scratch_bytes(step),
        }
        if row in self.setting.profiled:
            _try_part(result, "profile", lambda: profile_step(step))
        if step.device.type == "cuda":
            _try_part(result, "capture", step.capture)
        result["launch"] = step.launch_mode
        result.update(time_step(step, self.baseline, self.setting.repeats, self.setting.warm_ups))
        result["error"] = output_error(step.outputs(), self.references)
        limits = floor(self.work, self.ceilings, made["layers"], made["kind"], result["weights_bytes"])
        result["floor"] = limits
        least = limits["floor_ms"]
        result["over_floor"] = None if least is None else result["step"]["median_ms"] / least
        if row == BASELINE:
            self.baseline = step
        return result

    def residents(self, rows: Sequence[str]) -> list[dict[str, Any]]:
        """Memory of weights when the engines of `rows` are on the device together, one after the other.

        Layers that a row does not quantize are shared with the 16-bit engine; `separate_bytes` is what engines with
        weights of their own take, computed from their sizes.

        Returns:
            Per number of engines: `engines`, `allocated_bytes` (measured, None on a CPU), `shared_bytes`,
            `separate_bytes`.
        """
        release()
        kept: list[torch.nn.Module] = []
        found: list[dict[str, Any]] = []
        shared, separate = dict(self._shared_storages), 0
        base = allocated_bytes()
        for count, row in enumerate(rows, start=1):
            kept.append(self.make(row)[0])
            held = storages(kept[-1])
            shared.update(held)
            separate += sum(held.values())
            release()
            now = allocated_bytes()
            more = None if now is None or base is None else now - base
            found.append(
                {
                    "engines": list(rows[:count]),
                    "allocated_bytes": None if more is None else more + sum(self._shared_storages.values()),
                    "shared_bytes": sum(shared.values()),
                    "separate_bytes": separate,
                }
            )
        return found


def _try_part(result: dict[str, Any], name: str, work: Callable[[], Any]) -> None:
    """Puts what `work` returns into a row; its failure is noted under `part_errors` and leaves the row its timing."""
    try:
        found = work()
    except Exception as error:
        result.setdefault("part_errors", {})[name] = error_text(error)
    else:
        if found is not None:
            result[name] = found


def allocated_bytes() -> int | None:
    """Memory in use by tensors on the GPU; None without one."""
    return int(torch.cuda.memory_allocated()) if torch.cuda.is_available() else None


def release() -> None:
    """Frees what a finished row leaves behind: compiled blocks refer to themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
