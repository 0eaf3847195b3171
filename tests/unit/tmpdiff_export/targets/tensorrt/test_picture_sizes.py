"""Plans for several picture sizes, from torch modules: on the FAKES of tensorrt and CUDA, whose engines run on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fakes.fake_kernels  # noqa: F401
import numpy as np
import pytest
import torch
from fakes.install import Fakes, install

from engines.errors import BackendError, BuildError
from engines.manifest import EngineEntry
from engines.plan_entry import PlanEntry
from engines.precision import Precision
from tmpdiff_export.onnx_graphs.export import ExportInput
from tmpdiff_export.targets.accuracy import sqnr_db
from tmpdiff_export.targets.target import EngineJob, SourceModel, file_entry
from tmpdiff_export.weights.streamed import taken_weights
from tools.acceptance.checks import check_of
from tools.acceptance.export_families import store

TOKENS, WIDTH = 5, 6
EXAMPLE, WIDE, TALL = (8, 8), (8, 12), (16, 8)
AXES = {0: "batch", 2: "height", 3: "width"}

Made = tuple[EngineEntry, Path]
Make = Callable[..., Made]


class Denoiser(torch.nn.Module):
    """Convolutions around a vector of text and time."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(4, 8, 3, padding=1)
        self.text = torch.nn.Linear(WIDTH, 8)
        self.last = torch.nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        time = (timestep / 1000).to(latents.dtype)[:, None, None, None]
        text = self.text(hidden_states.mean(1))[:, :, None, None]
        return self.last(torch.nn.functional.silu(self.first(latents) + text + time))


class Decoder(torch.nn.Module):
    """Pictures of twice the size."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.nn.Conv2d(4, 12, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pixel_shuffle(self.last(latents), 2).sigmoid()


class TextEncoder(torch.nn.Module):
    """An embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(11, WIDTH)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.table(input_ids)


MODULES = {"denoiser": Denoiser, "vae_decoder": Decoder, "text_encoder": TextEncoder}


def module_of(kind: str) -> torch.nn.Module:
    """The same weights at every call."""
    torch.manual_seed(0)
    return MODULES[kind]()


def source(kind: str, sizes: tuple[tuple[int, int], ...]) -> SourceModel:
    module = module_of(kind)
    latents = torch.randn(2, 4, *EXAMPLE)
    symbols = {0: "batch"}
    if kind == "denoiser":
        inputs = [
            ExportInput("latents", latents, AXES),
            ExportInput("timestep", torch.full((2,), 500.0), symbols, keep_dtype=True),
            ExportInput("hidden_states", torch.randn(2, TOKENS, WIDTH), {0: "batch", 1: "text"}),
        ]
        outputs = {"model_output": AXES}
    elif kind == "vae_decoder":
        inputs = [ExportInput("latents", latents, AXES)]
        outputs = {"image": {0: "batch", 2: "image_height", 3: "image_width"}}
    else:
        inputs = [ExportInput("input_ids", torch.ones(2, TOKENS, dtype=torch.int64), symbols)]
        outputs = {"hidden_states": symbols}
    check = check_of(module, [item.name for item in inputs], *outputs, [tuple(item.example for item in inputs)])
    weights = dict(taken_weights(module))
    return SourceModel(
        module,
        weights.__getitem__,
        inputs,
        outputs,
        check,
        "",
        1 if kind == "vae_decoder" else 2,
        torch.float32,
        half=kind == "denoiser",
        sizes=sizes,
    )


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return install(monkeypatch)


@pytest.fixture
def make(installed: Fakes, tmp_path: Path) -> Make:
    """Builds an engine; its manifest entry and its file."""

    def made(kind: str = "denoiser", sizes: tuple[tuple[int, int], ...] = (), **shapes: str) -> Made:
        from engines.backends.tensorrt.profiles import ShapeRange
        from tmpdiff_export.targets.tensorrt.settings import PlanSettings
        from tmpdiff_export.targets.tensorrt.target import TensorRtTarget

        ranges = {symbol: ShapeRange.parse(text) for symbol, text in shapes.items()}
        settings = PlanSettings(shapes=ranges, cache=tmp_path / "plans")
        target = TensorRtTarget(settings, (Precision.FP16,), lambda *_: None)
        name = "fp16" if kind == "denoiser" else kind
        job = EngineJob(name, source(kind, sizes), "none", Precision.FP16, {}, 20.0)
        prepared = target.prepare(job)
        bundle = tmp_path / f"bundle{len(list(tmp_path.iterdir()))}"
        engines = bundle / "engines"
        engines.mkdir(parents=True)
        file = store(job, prepared.tensors, target.form, engines / f"{name}.safetensors")
        return prepared.task(bundle, [file_entry(bundle, file)])(), engines / f"{name}.plan"

    return made


def plan_of(made: Made) -> PlanEntry:
    plan = made[0].plan
    assert plan is not None
    return plan


def latents_of(made: Made) -> list[tuple[tuple[int, ...], ...]]:
    return [profile["latents"] for profile in plan_of(made).profiles]


def ranges_at(*size: int, batch: tuple[int, int, int] = (1, 2, 8)) -> tuple[tuple[int, ...], ...]:
    return tuple((samples, 4, *size) for samples in batch)


def run(made: Made, inputs: dict[str, np.ndarray]) -> np.ndarray:
    from engines.backends.tensorrt.host import tensorrt_host

    host = tensorrt_host()
    try:
        host.add("engine", *made)
        (output,) = host.engine("engine").run(inputs).values()
        return output
    finally:
        host.close()


@pytest.mark.parametrize("kind", ["denoiser", "vae_decoder"])
def test_an_engine_draws_every_size_as_torch_does(make: Make, installed: Fakes, kind: str) -> None:
    sizes = (EXAMPLE, WIDE, TALL)
    made = make(kind, sizes)
    batch = (1, 2, 8) if kind == "denoiser" else (1, 1, 4)
    assert latents_of(made) == [ranges_at(*size, batch=batch) for size in sizes]
    assert made[0].inputs[0].shape == ("batch", 4, "height", "width")
    model = source(kind, sizes)
    for height, width in (WIDE, EXAMPLE, TALL):
        given = [torch.randn(2, 4, height, width), *(item.example for item in model.inputs[1:])]
        with torch.inference_mode():
            expected = module_of(kind)(*given).numpy()
        arrays = {item.name: array.numpy() for item, array in zip(model.inputs, given, strict=True)}
        assert sqnr_db(expected, run(made, arrays)) > 50
    assert installed.cuda.leaks() == []


def test_the_build_runs_the_plan_at_every_size(make: Make, installed: Fakes) -> None:
    make("denoiser", (WIDE, EXAMPLE, TALL))
    used = [call.args[0] for call in installed.cuda.calls if call.name == "set_optimization_profile_async"]
    assert set(used) == {0, 1, 2}


def test_the_first_profile_is_that_of_the_first_size(make: Make) -> None:
    assert latents_of(make("denoiser", (TALL, EXAMPLE))) == [ranges_at(*TALL), ranges_at(*EXAMPLE)]


def test_a_text_encoder_has_one_profile_whatever_the_sizes(make: Make) -> None:
    made = make("text_encoder", (EXAMPLE, WIDE, TALL))
    assert plan_of(made).profiles == ({"input_ids": ((1, TOKENS), (2, TOKENS), (8, TOKENS))},)


def test_without_sizes_it_is_that_of_the_examples(make: Make) -> None:
    made = make("denoiser")
    assert latents_of(made) == [ranges_at(*EXAMPLE)]
    with pytest.raises(BackendError, match=r"\(2, 4, 8, 12\), optimization profile 0 takes \(1, 4, 8, 8\) to"):
        run(made, {"latents": np.zeros((2, 4, *WIDE), np.float32), "timestep": np.ones(2, np.float32),
                   "hidden_states": np.zeros((2, TOKENS, WIDTH), np.float32)})  # fmt: skip


def test_sizes_share_the_weights_and_the_scratch_of_the_largest(make: Make) -> None:
    one, two, three = (
        plan_of(make("denoiser", sizes)) for sizes in ((EXAMPLE,), (EXAMPLE, TALL), (EXAMPLE, WIDE, TALL))
    )
    assert one.weights_bytes == two.weights_bytes == three.weights_bytes
    assert one.scratch_bytes < two.scratch_bytes == three.scratch_bytes


def test_plans_are_kept_by_their_sizes(make: Make, installed: Fakes) -> None:
    for sizes, builds in (((EXAMPLE,), 1), ((EXAMPLE, WIDE), 2), ((WIDE, EXAMPLE), 3), ((EXAMPLE, WIDE), 3)):
        make("denoiser", sizes)
        assert len(installed.settings.builds) == builds


# --- ranges that are asked for


def test_a_range_of_heights_and_widths_takes_the_place_of_the_profiles(make: Make) -> None:
    made = make("denoiser", (EXAMPLE, WIDE), height="8:8:16", width="8:8:12")
    assert latents_of(made) == [((1, 4, 8, 8), (2, 4, 8, 8), (8, 4, 16, 12))]


def test_a_range_of_heights_leaves_a_profile_for_each_width(make: Make) -> None:
    made = make("denoiser", (EXAMPLE, WIDE, TALL), height="8:8:16")
    expected = [tuple((batch, 4, height, width) for batch, height in ((1, 8), (2, 8), (8, 16))) for width in (8, 12)]
    assert latents_of(made) == expected


def test_another_symbol_has_its_range_in_every_profile(make: Make) -> None:
    made = make("denoiser", (EXAMPLE, WIDE), text="1:5:9")
    assert [profile["hidden_states"] for profile in plan_of(made).profiles] == [
        ((1, 1, WIDTH), (2, 5, WIDTH), (8, 9, WIDTH))
    ] * 2


def test_a_range_that_leaves_out_a_size_is_refused(make: Make) -> None:
    with pytest.raises(BuildError, match="--shape height=8:8:12 leaves out latents of height 16, which a picture size"):
        make("denoiser", (EXAMPLE, TALL), height="8:8:12")


def test_a_range_of_a_symbol_that_the_denoiser_lacks_is_refused(make: Make) -> None:
    with pytest.raises(BuildError, match=r"--shape names frames, which no denoiser input has; .* batch, height, width"):
        make("denoiser", (EXAMPLE,), frames="1:2:3")
