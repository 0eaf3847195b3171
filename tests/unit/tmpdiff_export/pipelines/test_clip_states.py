"""CLIP's hidden states before its last layer: those of transformers, and in a process that did not make the model."""

from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from helpers.build_tasks import compiled_shapes
from helpers.needs_compiler import needs_compiler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tmpdiff_export.pipelines.families.components import ClipT5TextEncoder, SdxlTextEncoder, clip_states
from tmpdiff_export.targets.torch.compile import EngineModule, compile_package, without_capturing_hooks
from tmpdiff_export.weights.streamed import on_meta

WIDTH, TOKENS, LAYERS = 16, 9, 3


def clip(kind: type[torch.nn.Module], seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_attention_heads=2, num_hidden_layers=LAYERS,
        projection_dim=WIDTH, max_position_embeddings=TOKENS, eos_token_id=2,
    )  # fmt: skip
    return kind(config).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 50, (2, TOKENS), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_they_are_those_that_transformers_records(kind: type[torch.nn.Module], tokens: torch.Tensor) -> None:
    encoder = clip(kind, 0)
    with torch.no_grad():
        (states, earlier), output = clip_states(encoder, tokens, [1, LAYERS])
        recorded = encoder(tokens, output_hidden_states=True)
    assert len(recorded.hidden_states) == LAYERS + 1
    assert torch.equal(states, recorded.hidden_states[-2])
    assert torch.equal(earlier, recorded.hidden_states[0])
    assert not torch.equal(states, recorded.hidden_states[-1])
    assert torch.equal(output[0], recorded[0])
    assert not [hook for part in encoder.modules() for hook in part._forward_pre_hooks], "no hook is left"


@dataclass(frozen=True)
class Packed:
    """A text encoder without its weights."""

    module: EngineModule
    inputs: tuple[torch.Tensor, ...]


@pytest.fixture
def packed(tokens: torch.Tensor) -> dict[str, Packed]:
    first = clip(CLIPTextModelWithProjection, 1)
    with torch.no_grad():  # as the runs of a pipeline before it is built
        first(tokens, output_hidden_states=True)
    sd3 = ClipT5TextEncoder(
        first, clip(CLIPTextModelWithProjection, 2), None, width=3 * WIDTH, max_sequence_length=TOKENS
    )
    sdxl = SdxlTextEncoder(clip(CLIPTextModel, 3), clip(CLIPTextModelWithProjection, 4), clip_skip=1)
    made = {}
    for name, encoder, inputs in (("sd3", sd3, (tokens, tokens.flip(0))), ("sdxl", sdxl, (tokens, tokens.flip(0)))):
        empty = on_meta(encoder)
        without_capturing_hooks(empty)
        made[name] = Packed(EngineModule(empty, torch.float32, [True] * len(inputs)).eval(), inputs)
    return made


SHAPES = {
    "sd3": ((2, 2 * TOKENS, 3 * WIDTH), (2, 2 * WIDTH)),
    "sdxl": ((2, TOKENS, 2 * WIDTH), (2, WIDTH), (2, TOKENS, 2 * WIDTH)),
}


def test_both_text_encoders_are_exported_where_they_arrive(
    packed: dict[str, Packed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = []
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda program, **_: exported.append(program))
    for name, one in packed.items():
        arrived = pickle.loads(pickle.dumps(one.module))
        outputs = compile_package(arrived, "cpu", one.inputs, tmp_path / "none.pt2").outputs
        assert tuple(tuple(item.shape) for item in outputs) == SHAPES[name]
    assert len(exported) == 2


@needs_compiler
@pytest.mark.long
def test_a_worker_compiles_both_text_encoders(packed: dict[str, Packed], tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as workers:
        made = {
            name: workers.submit(compiled_shapes, one.module, one.inputs, tmp_path / f"{name}.pt2")
            for name, one in packed.items()
        }
        assert {name: one.result() for name, one in made.items()} == SHAPES
