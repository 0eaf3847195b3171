"""What a user would pick instead: torchao's FP8 and INT8 through its own API, on the same layers."""

from __future__ import annotations

from typing import Any

import torch

from engines.errors import BackendError
from engines.precision import Precision
from tools.gpu_bench.quantize import choose_layers

# Row name -> (precision whose layers are taken, configuration, its arguments). The defaults are torchao's own.
PEERS = {
    "torchao-fp8": (Precision.FP8, "Float8DynamicActivationFloat8WeightConfig", "PerTensor"),
    "torchao-fp8-row": (Precision.FP8, "Float8DynamicActivationFloat8WeightConfig", "PerRow"),
    "torchao-int8": (Precision.INT8, "Int8DynamicActivationInt8WeightConfig", None),
}


def torchao_version() -> str | None:
    """Its version, None if it is not installed."""
    try:
        import torchao
    except ImportError:
        return None
    return str(torchao.__version__)


def quantize_with_torchao(module: torch.nn.Module, row: str, *, recommended: bool) -> None:
    """Quantizes the layers of `module` in place.

    Args:
        module: a sharing copy; new weights take the place of shared ones.
        row: key in `PEERS`.
        recommended: lets torchao change Inductor's global settings as its API does unless told otherwise. They include
            coordinate descent tuning, which takes minutes at this size.

    Raises:
        BackendError: torchao is not installed.
    """
    precision, config_name, granularity = PEERS[row]
    if torchao_version() is None:
        raise BackendError(f"row {row!r} needs torchao, which is not installed; pip install torchao")
    from torchao import quantization

    arguments: dict[str, Any] = {"set_inductor_config": recommended}
    if granularity is not None:
        arguments["granularity"] = getattr(quantization, granularity)()
    names = set(choose_layers(module, precision, linear_only=True).names)
    config = getattr(quantization, config_name)(**arguments)
    quantization.quantize_(module, config, filter_fn=lambda layer, name: name in names)
