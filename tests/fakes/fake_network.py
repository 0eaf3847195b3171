"""Fake network definition and ONNX parser: inputs, outputs and nodes are read with the real `onnx` package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx

from fakes import fake_onnx
from fakes.fake_plan import TensorInfo
from fakes.fake_trt_base import Dims, ILogger, checked_logger, enums, flag, installation


class ITensor:
    """A network input or output."""

    def __init__(self, info: TensorInfo) -> None:
        self.name = info.name
        self.fake_info = info

    @property
    def shape(self) -> Dims:
        return Dims(self.fake_info.shape)

    @property
    def dtype(self) -> Any:
        return flag("DataType", self.fake_info.dtype)

    @property
    def is_shape_tensor(self) -> bool:
        return False

    @property
    def is_execution_tensor(self) -> bool:
        return True

    @property
    def is_network_input(self) -> bool:
        return self.fake_info.is_input

    @property
    def is_network_output(self) -> bool:
        return not self.fake_info.is_input

    @property
    def location(self) -> Any:
        return flag("TensorLocation", "DEVICE")


class ILayer:
    """A node of the ONNX graph. Its tensors are not modelled."""

    def __init__(self, name: str, operator: str) -> None:
        self.name = name
        self.metadata = f"[ONNX Layer: {name}]"
        self.fake_operator = operator

    @property
    def type(self) -> Any:
        names = {"QuantizeLinear": "QUANTIZE", "DequantizeLinear": "DEQUANTIZE", "MatMul": "MATRIX_MULTIPLY"}
        names |= {"Conv": "CONVOLUTION", "Softmax": "SOFTMAX", "Constant": "CONSTANT", "Shape": "SHAPE", "Cast": "CAST"}
        return flag("LayerType", names.get(self.fake_operator, "ELEMENTWISE"))


class INetworkDefinition:
    """What the parser put there."""

    def __init__(self, builder: Any, flags: int) -> None:
        self.builder = builder
        self.flags = flags
        self.name = "Unnamed Network 0"
        self.fake_model: onnx.ModelProto | None = None
        self.fake_inferred: onnx.ModelProto | None = None
        self.fake_tensors: tuple[TensorInfo, ...] = ()
        self.fake_layers: list[ILayer] = []

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags & 1 << int(flag))

    def _select(self, is_input: bool) -> list[ITensor]:
        return [ITensor(item) for item in self.fake_tensors if item.is_input == is_input]

    @property
    def num_inputs(self) -> int:
        return len(self._select(True))

    @property
    def num_outputs(self) -> int:
        return len(self._select(False))

    @property
    def num_layers(self) -> int:
        return len(self.fake_layers)

    def get_input(self, index: int) -> ITensor:
        return self._select(True)[index]

    def get_output(self, index: int) -> ITensor:
        return self._select(False)[index]

    def get_layer(self, index: int) -> ILayer:
        return self.fake_layers[index]

    def __len__(self) -> int:
        return len(self.fake_layers)

    def __getitem__(self, index: int) -> ILayer:
        return self.fake_layers[index]

    def __iter__(self) -> Iterator[ILayer]:
        return iter(self.fake_layers)

    def __bool__(self) -> bool:
        return True


class ParserError:
    """One thing the parser did not like. All members are methods, as in the real bindings."""

    def __init__(self, code: str, desc: str, node: int = -1, node_name: str = "", operator: str = "") -> None:
        self._code, self._desc, self._node, self._name, self._operator = code, desc, node, node_name, operator

    def code(self) -> Any:
        return flag("ErrorCode", self._code)

    def desc(self) -> str:
        return self._desc

    def file(self) -> str:
        return "ModelImporter.cpp"

    def func(self) -> str:
        return "parseNode"

    def line(self) -> int:
        return 1

    def node(self) -> int:
        return self._node

    def node_name(self) -> str:
        return self._name

    def node_operator(self) -> str:
        return self._operator

    def local_function_stack(self) -> list[str]:
        return []

    def local_function_stack_size(self) -> int:
        return 0

    def __str__(self) -> str:
        where = (
            f"In node {self._node} with name: {self._name} and operator: {self._operator} " if self._node >= 0 else ""
        )
        return f"{where}({self.func()}): {self._code}: {self._desc}"


class OnnxParser:
    """Puts an ONNX model into a network."""

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._logger = network, checked_logger(logger)
        self._errors: list[ParserError] = []
        self.flags = 1 << int(flag("OnnxParserFlag", "NATIVE_INSTANCENORM"))

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def clear_errors(self) -> None:
        self._errors.clear()

    def set_flag(self, flag: Any) -> None:
        self.flags |= 1 << int(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags &= ~(1 << int(flag))

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags & 1 << int(flag))

    def supports_operator(self, op_name: str) -> bool:
        return op_name not in installation().refused_ops

    def set_builder_config(self, builder_config: Any) -> bool:
        return True

    def parse_from_file(self, model: str) -> bool:
        """External data is looked for beside the file."""
        if not isinstance(model, str):
            raise TypeError(
                f"parse_from_file(): incompatible function arguments: expected str, received {type(model).__name__}"
            )
        try:
            proto = fake_onnx.load(model)
        except Exception as error:
            return self._fail(ParserError("MODEL_DESERIALIZE_FAILED", f"Failed to parse ONNX model {model}: {error}"))
        return self._take(proto)

    def parse(self, model: Any, path: str | None = None) -> bool:
        """A serialized model; external data is looked for beside `path`."""
        try:
            proto = onnx.ModelProto.FromString(bytes(model))
            if path is not None:
                onnx.load_external_data_for_model(proto, str(onnx.os.path.dirname(path)))
        except Exception as error:
            return self._fail(ParserError("MODEL_DESERIALIZE_FAILED", f"Failed to parse ONNX model: {error}"))
        return self._take(proto)

    def _take(self, model: onnx.ModelProto) -> bool:
        if not model.graph.node or not model.graph.output:
            return self._fail(ParserError("INVALID_GRAPH", "the model has no nodes or no outputs"))
        refused = installation().refused_ops
        for index, node in enumerate(model.graph.node):
            if node.op_type in refused or node.domain not in ("", "ai.onnx", "trt"):
                self._fail(
                    ParserError(
                        "UNSUPPORTED_NODE",
                        f"No importer registered for op: {node.op_type}",
                        index,
                        node.name,
                        node.op_type,
                    )
                )
            if node.op_type == "QuantizeLinear" and _zero_point_type(model, node) == onnx.TensorProto.UINT8:
                self._fail(
                    ParserError(
                        "UNSUPPORTED_NODE_DATATYPE",
                        "TensorRT does not support UINT8 zero points; use INT8 with zero point 0",
                        index,
                        node.name,
                        node.op_type,
                    )
                )
        try:
            inferred = fake_onnx.inferred(model)
            tensors = fake_onnx.tensors(inferred)
        except (ValueError, onnx.shape_inference.InferenceError) as error:
            return self._fail(ParserError("UNSUPPORTED_GRAPH", str(error)))
        if self._errors:
            return False
        self._network.fake_model, self._network.fake_inferred = model, inferred
        self._network.fake_tensors = tensors
        self._network.fake_layers = [
            ILayer(node.name or f"{node.op_type}_{index}", node.op_type) for index, node in enumerate(model.graph.node)
        ]
        if model.graph.name:
            self._network.name = model.graph.name
        return True

    def _fail(self, error: ParserError) -> bool:
        self._errors.append(error)
        self._logger.log(ILogger.ERROR, str(error))
        return False


def _zero_point_type(model: onnx.ModelProto, node: onnx.NodeProto) -> int | None:
    name = node.input[2] if len(node.input) > 2 else ""
    return next((item.data_type for item in model.graph.initializer if item.name == name), None)


def has_precision_flags(flags: int) -> list[str]:
    """Names of precision builder flags (TensorRT 10 only) in a bit set."""
    members = enums()["BuilderFlag"].__members__
    return [
        name
        for name in ("FP16", "BF16", "INT8", "FP8", "INT4", "FP4")
        if name in members and flags & 1 << int(members[name])
    ]
