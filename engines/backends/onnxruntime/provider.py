"""The CUDA execution provider: whether it is there, and sessions that run on nothing else."""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from engines.backends.cuda.gpu import Gpu, current_gpu
from engines.backends.onnxruntime.session import OnnxSession, library, words
from engines.errors import BackendError

PROVIDER: Final = "CUDAExecutionProvider"

# On a CPU, with ONNX Runtime 1.31, these three together computed graphs of FP16 and FP8 silently wrong;
# QDQPropagationTransformer moved FP8 codes through a Transpose, which has no FP8, so that the session was refused.
# They prepare the graph for integer kernels of the CPU provider, which the CUDA provider does not have.
DISABLED_OPTIMIZERS: Final = ("QDQPropagationTransformer", "WeightBiasQuantization", "MatMulAddFusion")

_INSTALL = "pip uninstall -y onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]' cuda-bindings"
_REFUSED = "fallback to CPU EP has been explicitly disabled"


def require_provider() -> Gpu:
    """The current GPU, for a build of ONNX Runtime that has the CUDA provider.

    Whether the provider finds its CUDA and cuDNN libraries shows when a session is made; those that wheels of torch or
    NVIDIA brought are loaded here. From then on ONNX Runtime's default logger shows errors only: at each session it
    would warn that the provider is not a plugin.

    Raises:
        BackendError: ONNX Runtime is built without the provider, cuda-bindings is not installed, or there is no GPU.
    """
    onnxruntime = library()
    available = onnxruntime.get_available_providers()
    if PROVIDER not in available:
        raise BackendError(
            f"backend 'onnxruntime' on a GPU needs {PROVIDER}; the installed ONNX Runtime {onnxruntime.__version__} has "
            f"{', '.join(available)}; {_INSTALL}, or use --backend torch"
        )
    gpu = current_gpu()
    _preload()
    onnxruntime.set_default_logger_severity(3)
    return gpu


def open_session(
    path: Path,
    *,
    name: str,
    sizes: Mapping[str, int],
    device: int,
    stream: int,
    optimized: Path | None = None,
) -> OnnxSession:
    """A session whose every operator runs on the CUDA provider, on one stream.

    What is chosen, and why:

    - The symbolic axes get their sizes now. The arithmetic on shapes that a traced graph keeps becomes constants; else
      ONNX Runtime would put it on the CPU, which no session may use here (`session.disable_cpu_ep_fallback`).
    - Graph optimizations are on, those of Q/DQ pairs too: a 4-bit weight and its product become MatMulNBits, which
      reads 4-bit weights. The provider has no product of two 8-bit operands: there the pairs stay, an 8-bit weight is
      dequantized at every call and the product is FP16's, which saves memory and not time. `DISABLED_OPTIMIZERS` are
      off. What comes out is compared with torch when a bundle is built.
    - FP32 products are FP32's, not TF32's, and layer norms add up in FP32.
    - cuDNN's algorithms come from its heuristics. The default, timing them, may choose another one, with other
      rounding, each time an engine comes back into memory.
    - Weights are allocated as large as they are, and scratch as it is asked for; no block is planned ahead per set of
      shapes, which would come on top of what the first call took. Sessions do not share scratch: their allocators know
      nothing of each other's streams. `gpu_mem_limit` stays at the whole GPU: a share per session would refuse what
      fits.
    - No CUDA graph. ONNX Runtime captures in CUDA's global mode, in which the allocations of an engine that is being
      loaded by another thread end the capture; and some kernels copy from page-locked memory that is used again after
      the call, which a replayed graph would read.

    Args:
        path: the ONNX file, whose hash has been checked.
        name: what error messages call the engine.
        sizes: of the graph's symbolic axes, by symbol.
        device: CUDA device index.
        stream: a CUDA stream of it as a number, which must outlive the session.
        optimized: where to write the graph as the session runs it, its weights beside it; None not to.

    Raises:
        BackendError: ONNX Runtime refuses the file, the provider cannot start or has no kernel for an operator (which
            are named), or there is not enough device memory.
    """
    providers = [(PROVIDER, provider_options(device, stream))]
    options = _options(sizes)
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        # Beside it: a protobuf ends at 2 GB.
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{optimized.name}.data"
        )
    try:
        return OnnxSession(path, options, name=name, providers=providers)
    except BackendError as error:
        if _REFUSED in str(error):
            raise BackendError(f"engine {name}: {_why_refused(path, sizes, providers)}") from error
        raise BackendError(f"engine {name}: {error}{memory_advice(str(error))}") from error


def provider_options(device: int, stream: int) -> dict[str, str]:
    """Options of the CUDA provider; see `open_session`."""
    return {
        "device_id": str(device),
        "user_compute_stream": str(stream),
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "enable_skip_layer_norm_strict_mode": "1",
        "use_tf32": "0",
    }


def memory_advice(said: str) -> str:
    """What to do about a failure, if it is one of memory; else empty."""
    if "out of memory" in said or "Failed to allocate" in said:
        return "; use a smaller batch, limit the resident engines, or end other processes on the GPU"
    return ""


def _options(sizes: Mapping[str, int]) -> Any:
    """Session options but for what depends on the purpose."""
    options = library().SessionOptions()
    options.log_severity_level = 4  # what fails is raised
    options.intra_op_num_threads = 1  # nothing is computed on the CPU
    options.enable_mem_pattern = False
    options.add_session_config_entry("optimization.disable_specified_optimizers", ";".join(DISABLED_OPTIMIZERS))
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    for symbol, size in sizes.items():
        options.add_free_dimension_override_by_name(symbol, size)
    return options


def _why_refused(path: Path, sizes: Mapping[str, int], providers: list[tuple[str, dict[str, str]]]) -> str:
    """Asks ONNX Runtime once more, with the CPU allowed, what it would have run there."""
    onnxruntime = library()
    options = _options(sizes)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
        started = PROVIDER in session.get_providers()
        refused = Counter(
            f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            for part in session.get_provider_graph_assignment_info()
            if part.ep_name != PROVIDER
            for node in part.get_nodes()
        )
    except Exception as error:  # its exception classes share no public base
        return f"{PROVIDER} does not take the whole graph, and why is not known: {words(error)}"
    if not started:
        wanted = f"CUDA {getattr(onnxruntime, 'cuda_version', '') or '13'} and cuDNN 9"
        said = _preload() or "ONNX Runtime's log line above says why"
        return f"{PROVIDER} cannot start ({said}); it needs the libraries of {wanted}: {_INSTALL}"
    operators = ", ".join(f"{count} x {operator}" for operator, count in sorted(refused.items()))
    return (
        f"{PROVIDER} of ONNX Runtime {onnxruntime.__version__} has no kernel for {operators}, and nothing may run on the "
        "CPU instead; install a newer onnxruntime-gpu, or use --backend torch or tensorrt"
    )


@functools.cache  # libraries stay loaded
def _preload() -> str:
    """Loads the CUDA and cuDNN libraries that wheels brought; what could not be loaded, in one line."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), warnings.catch_warnings():  # it prints
        warnings.simplefilter("ignore")
        library().preload_dlls(msvc=False)
    lines = said.getvalue().strip().splitlines()
    return lines[0][:200] if lines else ""
