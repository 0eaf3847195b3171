"""Engines for ONNX Runtime on an NVIDIA GPU: the exported graphs as they are."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from engines.backends.cuda.gpu import Gpu
from engines.backends.onnxruntime.cpu import version
from engines.backends.onnxruntime.provider import require_provider
from engines.errors import BackendError
from engines.manifest import EngineEntry
from engines.precision import Precision
from tmpdiff_export.targets.accuracy import AccuracyCheck
from tmpdiff_export.targets.exported import OnnxForm
from tmpdiff_export.targets.onnxruntime.graph_copy import prepare_copy
from tmpdiff_export.targets.target import EngineJob, PreparedEngine, file_entry, require_weights_fit, tensor_specs

_QDQ = ("QuantizeLinear", "DequantizeLinear")


class OnnxCudaTarget:
    """`tmpdiff_export.targets.target.Target`: strongly typed ONNX files, `engines/<name>.onnx`, checked on this GPU."""

    backend = "onnxruntime"
    fixed_shapes = False

    def __init__(self, precisions: Sequence[Precision]) -> None:
        """Checks what can be checked before work begins; runs a graph of one node on the GPU.

        Args:
            precisions: the denoiser engines that will be made.

        Raises:
            BackendError: no GPU, an ONNX Runtime that cannot use it, or a precision that it cannot have.
        """
        if Precision.NVFP4 in precisions:
            raise BackendError(
                "backend 'onnxruntime' on a GPU has no nvfp4; choose from fp16, fp8, int8, int4, or use --backend tensorrt "
                "on Blackwell"
            )
        try:
            self._gpu = require_provider()
            _try(self._gpu)
        except BackendError as error:
            raise BackendError(f"{error}; --device cpu builds for this machine's CPU") from error

    def require_memory(self, parameters: int) -> None:
        """Refuses a denoiser whose 16-bit weights alone would not fit; see `Target.require_memory`."""
        require_weights_fit(parameters, self._gpu.total_bytes)

    @property
    def key(self) -> dict[str, Any]:
        """See `Target.key`."""
        return {"backend": self.backend, "version": version(), "device": self._gpu.described}

    @property
    def form(self) -> OnnxForm:
        """See `Target.form`."""
        return OnnxForm()

    def prepare(self, job: EngineJob) -> PreparedEngine:
        """Exports the graph; see `Target.prepare`."""
        check = job.model.check
        return prepare_copy(
            job,
            lambda name, path, entry: _measured(name, path, entry, check),
            backend=self.backend,
            version=version(),
            device=self._gpu.described,
        )


def _measured(name: str, path: Path, entry: EngineEntry, check: AccuracyCheck) -> EngineEntry:
    """Loads an engine as the runtime would and measures its SQNR."""
    from engines.backends.onnxruntime.host import onnxruntime_cuda_host  # which needs cuda-bindings

    with tempfile.TemporaryDirectory(prefix=".optimized-", dir=path.parent) as scratch:
        optimized = Path(scratch) / "optimized.onnx"
        host = onnxruntime_cuda_host(optimized=optimized)
        try:
            host.add(name, entry, path)
            measured = check.sqnr_db(host.engine(name))
        finally:
            host.close()
        counts = operator_counts(optimized)
    return entry.model_copy(update={"sqnr_db": round(measured, 2), "lowering": counts})


def operator_counts(optimized: Path) -> dict[str, int]:
    """What ONNX Runtime put in the place of standard operators, and the Q/DQ operators that it kept, as counts.

    Args:
        optimized: the graph as a session runs it.
    """
    graph = onnx.load(optimized, load_external_data=False).graph
    counts = Counter(node.op_type for node in graph.node if node.domain not in ("", "ai.onnx") or node.op_type in _QDQ)
    return dict(sorted(counts.items()))


def _try(gpu: Gpu) -> None:
    """Runs a product on the GPU: libraries that the provider misses show here, and not in the middle of a build.

    Raises:
        BackendError: the provider cannot start, or cannot compute.
    """
    from engines.backends.onnxruntime.host import onnxruntime_cuda_host

    half = TensorProto.FLOAT16
    tensors = {name: helper.make_tensor_value_info(name, half, ("batch", 8)) for name in ("latents", "image")}
    weight = helper.make_tensor("weight", half, (8, 8), np.eye(8, dtype=np.float16).tobytes(), raw=True)
    node = helper.make_node("MatMul", ["latents", "weight"], ["image"])
    graph = helper.make_graph([node], "try", [tensors["latents"]], [tensors["image"]], [weight])
    data = np.arange(16, dtype=np.float32).reshape(2, 8)
    with tempfile.TemporaryDirectory() as scratch, closing(onnxruntime_cuda_host()) as host:
        path = Path(scratch) / "try.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
        file = file_entry(path.parent, path)
        entry = EngineEntry(
            file=file,
            backend=OnnxCudaTarget.backend,
            backend_version=version(),
            device=gpu.described,
            lowering={},
            onnx_sha256=file.sha256,
            recipe="none",
            sqnr_db=0.0,
            sqnr_floor_db=0.0,
            inputs=tensor_specs(graph.input),
            outputs=tensor_specs(graph.output),
        )
        host.add("trial", entry, path)
        if not np.array_equal(host.engine("trial").run({"latents": data})["image"], data):
            raise BackendError(
                f"ONNX Runtime {version()} computes a product with the unit matrix wrong on {gpu.name}; install a newer "
                "onnxruntime-gpu and driver, or use --backend torch"
            )
