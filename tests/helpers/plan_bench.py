"""The build side of the TensorRT backend on a fake installation."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fakes.install import Fakes
from helpers.linear_denoiser import PROFILE, save_model


class Bench:
    """The build side of the backend on one fake installation."""

    def __init__(self, fakes: Fakes, folder: Path) -> None:
        self.fakes, self.folder = fakes, folder
        names = ("builder", "options", "plan_store", "timing_cache", "build_progress")
        modules = {name: importlib.import_module(f"engines.backends.tensorrt.{name}") for name in names}
        modules["gpu"] = importlib.import_module("engines.backends.cuda.gpu")
        self.code = SimpleNamespace(**modules)
        self.gpu = self.code.gpu.current_gpu()
        self.timing_cache = self.code.timing_cache.timing_cache_path(folder, fakes.settings.version, self.gpu)
        self.target = folder / "engine.plan"

    def build(
        self, precision: str = "fp16", onnx: Path | None = None, target: Path | None = None, **options: Any
    ) -> Any:
        progress = options.pop("progress", None)
        profiles = options.pop("profiles", (PROFILE,))
        asked = self.code.plan_store.PlanRequest(
            onnx or save_model(self.folder / f"{precision}.onnx", precision),
            precision,
            profiles,
            self.code.options.PlanOptions(**options),
            self.gpu,
        )
        return self.code.builder.build_plan(
            asked, target or self.target, timing_cache=self.timing_cache, progress=progress
        )

    def left_behind(self) -> set[str]:
        """Files besides ONNX files and the timing cache."""
        names = {path.name for path in self.folder.iterdir()}
        return {name for name in names if ".onnx" not in name and not name.startswith(self.timing_cache.name)}


MakeBench = Callable[..., Bench]
