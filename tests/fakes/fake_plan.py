"""The fake plan: magic, a JSON header, the ONNX model (external data inlined), and a digest of it all."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

MAGIC = b"ftrtFAKE"


class PlanFormatError(Exception):
    """The bytes are no complete fake plan; the text is what gets logged."""


@dataclass(frozen=True)
class TensorInfo:
    """An input or output: dims are ints, or names of dynamic dimensions."""

    name: str
    dtype: str  # member of DataType
    dims: tuple[int | str, ...]
    is_input: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """With -1 for dynamic dimensions."""
        return tuple(item if isinstance(item, int) else -1 for item in self.dims)


@dataclass(frozen=True)
class LayerInfo:
    """One layer of the engine.

    Attributes:
        compute: what it computes in, for example "FP8" (a key of `Installation.layer_ms`).
        inputs, outputs: (tensor name, dimensions, type) each.
    """

    name: str
    kind: str  # LayerType as the inspector has it
    operator: str
    compute: str
    inputs: tuple[tuple[str, tuple[int, ...], str], ...]
    outputs: tuple[tuple[str, tuple[int, ...], str], ...]


@dataclass(frozen=True)
class Plan:
    """What a plan file holds.

    Attributes:
        profiles: per optimization profile, input name -> (min, opt, max) shape.
        weights: initializer name -> bytes.
        missing: names of the weights that were stripped.
    """

    version: str
    gpu: str
    compute_capability: tuple[int, int]
    flags: tuple[str, ...]
    hardware_compatibility: str
    optimization_level: int
    profiling_verbosity: str
    max_aux_streams: int
    name: str
    tensors: tuple[TensorInfo, ...]
    layers: tuple[LayerInfo, ...]
    profiles: tuple[dict[str, tuple[tuple[int, ...], ...]], ...]
    weights: dict[str, int]
    missing: tuple[str, ...] = ()
    model: bytes = field(default=b"", repr=False)

    @property
    def weights_bytes(self) -> int:
        return sum(self.weights.values())

    @property
    def missing_bytes(self) -> int:
        return sum(self.weights[name] for name in self.missing)

    def with_model(self, model: bytes) -> Plan:
        """A refitted plan."""
        return replace(self, model=model, missing=())


def encode(plan: Plan) -> bytes:
    """The plan file."""
    header = json.dumps(asdict(replace(plan, model=b"")) | {"model": len(plan.model)}, sort_keys=True).encode()
    body = MAGIC + len(header).to_bytes(8, "little") + header + plan.model
    return body + hashlib.sha256(body).digest()


def decode(data: bytes) -> Plan:
    """Reads a plan file.

    Raises:
        PlanFormatError: wrong magic, truncated or altered.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise PlanFormatError("Magic tag does not match")
    body, digest = data[:-32], data[-32:]
    if hashlib.sha256(body).digest() != digest:
        raise PlanFormatError("Deserialization failed: the serialized engine is truncated or corrupt")
    start = len(MAGIC) + 8
    length = int.from_bytes(data[len(MAGIC) : start], "little")
    return _from_json(json.loads(body[start : start + length]), bytes(body[start + length :]))


def _from_json(item: dict[str, Any], model: bytes) -> Plan:
    def tensor_rows(rows: Any) -> tuple[tuple[str, tuple[int, ...], str], ...]:
        return tuple((name, tuple(dims), dtype) for name, dims, dtype in rows)

    item["compute_capability"] = tuple(item["compute_capability"])
    item["flags"] = tuple(item["flags"])
    item["missing"] = tuple(item["missing"])
    item["tensors"] = tuple(TensorInfo(**{**row, "dims": tuple(row["dims"])}) for row in item["tensors"])
    item["layers"] = tuple(
        LayerInfo(**{**row, "inputs": tensor_rows(row["inputs"]), "outputs": tensor_rows(row["outputs"])})
        for row in item["layers"]
    )
    item["profiles"] = tuple(
        {name: tuple(tuple(shape) for shape in shapes) for name, shapes in profile.items()}
        for profile in item["profiles"]
    )
    return Plan(**{**item, "model": model})
