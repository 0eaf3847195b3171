"""Fake Refitter and OnnxParserRefitter: put the weights back into a stripped engine."""

from __future__ import annotations

from typing import Any

import onnx

from fakes import fake_onnx
from fakes.fake_network import ParserError
from fakes.fake_trt_base import ILogger, checked_logger


class Refitter:
    """Refits one engine. Weights are given by an OnnxParserRefitter."""

    def __init__(self, engine: Any, logger: ILogger) -> None:
        self._engine, self._logger = engine, checked_logger(logger)
        if not engine.refittable:
            self._logger.log(ILogger.ERROR, "createInferRefitter: the engine is not refittable")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.max_threads = 1
        self.weights_validation = True
        self.fake_source: onnx.ModelProto | None = None

    @property
    def logger(self) -> ILogger:
        return self._logger

    def get_missing_weights(self) -> list[str]:
        return list(self._engine.fake_plan.missing) if self.fake_source is None else []

    def get_all_weights(self) -> list[str]:
        return list(self._engine.fake_plan.missing or self._engine.fake_plan.weights)

    def refit_cuda_engine(self) -> bool:
        if self.get_missing_weights() or self.fake_source is None:
            self._logger.log(ILogger.ERROR, f"refitCudaEngine: missing weights {self.get_missing_weights()[:4]}")
            return False
        plan = self._engine.fake_plan
        try:
            model = fake_onnx.refit(plan.model, plan.missing, self.fake_source)
        except ValueError as error:
            self._logger.log(ILogger.ERROR, f"refitCudaEngine: {error}")
            return False
        self._engine.fake_plan = plan.with_model(model)
        self._engine.fake_here.cuda.record("refit_cuda_engine", plan.name)
        return True


class OnnxParserRefitter:
    """Reads the weights for a Refitter from an ONNX model."""

    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self._refitter, self._logger = refitter, checked_logger(logger)
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def clear_errors(self) -> None:
        self._errors.clear()

    def refit_from_file(self, model: str) -> bool:
        """True if the file has every missing weight; then call Refitter.refit_cuda_engine."""
        try:
            source = fake_onnx.load(model)
            plan = self._refitter._engine.fake_plan
            fake_onnx.refit(plan.model, plan.missing, source)
        except Exception as error:
            self._errors.append(ParserError("REFIT_FAILED", str(error)))
            self._logger.log(ILogger.ERROR, f"refitFromFile: {error}")
            return False
        self._refitter.fake_source = source
        return True
