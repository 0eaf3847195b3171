"""What a manifest says of an engine that is made of AOTInductor packages, and the checks of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from engines.documents import Document, FileEntry


class PackageCall(Document):
    """A call of one of the packages that an engine is made of.

    Attributes:
        package: 0 for the engine file, i for `PackageEntry.blocks[i - 1]`.
        weights: the tensors it takes, as [begin, end) among all of the engine's in the order of their names.
        inputs: the values that it takes behind them. Values are numbered from 0: the engine's inputs, then what each
            call returns.
        outputs: how many values it returns.
    """

    package: int = Field(ge=0)
    weights: tuple[tuple[int, int], ...]
    inputs: tuple[int, ...]
    outputs: int = Field(ge=1)


class PackageEntry(Document):
    """What is particular to an AOTInductor package of the torch backend.

    Attributes:
        batch: rows of a call; other batch sizes are made of such calls.
        dtype: what is computed in where nothing is quantized.
        weights_bytes: memory of its weights on the device.
        operators: what it calls back into the process that runs it; see `engines.backends.torch.library`.
        blocks: further packages, if repeated blocks were compiled once.
        calls: of the engine file and of `blocks`, one after the other; empty if the engine file is all there is.
        results: the values that are the engine's outputs; empty if `calls` is.
    """

    batch: int = Field(ge=1)
    dtype: Literal["float16", "bfloat16", "float32"]
    weights_bytes: int = Field(ge=0)
    operators: tuple[Literal["attention_fp8"], ...] = ()
    blocks: tuple[FileEntry, ...] = ()
    calls: tuple[PackageCall, ...] = ()
    results: tuple[int, ...] = ()

    def check_calls(self, path: str, inputs: int, outputs: int) -> None:
        """Checks that the calls take and give what an engine of so many inputs and outputs has; `path` is its file's.

        Raises:
            ValueError: they do not.
        """
        known = inputs
        if self.blocks and not self.calls:
            raise ValueError(f"{path} has {len(self.blocks)} further packages and no calls of them")
        for number, call in enumerate(self.calls):
            if call.package > len(self.blocks):
                raise ValueError(f"call {number} is of package {call.package}, there are {len(self.blocks) + 1}")
            if any(not 0 <= value < known for value in call.inputs):
                raise ValueError(f"call {number} takes values {call.inputs}, {known} are known by then")
            if any(not 0 <= begin < end for begin, end in call.weights):
                raise ValueError(f"call {number} takes weights {call.weights}, expected [begin, end) of some")
            known += call.outputs
        if self.calls and len(self.results) != outputs:
            raise ValueError(f"calls give {len(self.results)} results, expected {outputs}")
        if any(not 0 <= value < known for value in self.results):
            raise ValueError(f"results are values {self.results}, {known} are known")
