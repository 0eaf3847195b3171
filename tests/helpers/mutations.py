"""Pipeline folders with one thing wrong each, of a seed: what people and programs do to folders, and what attackers do."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    None, "odd", "", -1, 0, 10**9, 10**30, 1.5, True, [], [3], [10**9, 10**9], {}, {"a": 1}, "\ud800\n[/red]\x1b[31m",
)  # fmt: skip
CLASSES = (
    ["diffusers", "AutoencoderKL"],
    ["diffusers", "AutoencoderTiny"],
    ["diffusers", "UNet2DConditionModel"],
    ["diffusers", "SD3Transformer2DModel"],
    ["diffusers", "DDPMScheduler"],
    ["diffusers", "ConfigMixin"],
    ["diffusers", "no_such_class"],
    ["diffusers", "__version__"],
    ["diffusers", ""],
    ["transformers", "T5EncoderModel"],
    ["transformers", "CLIPTextModel"],
    ["transformers", "CLIPTokenizer"],
    ["transformers", "T5TokenizerFast"],
    ["transformers", "PreTrainedModel"],
    ["transformers", "AutoModel"],
    ["transformers", "pipeline"],
    ["os", "system"],
    ["subprocess", "Popen"],
    ["antigravity", "fly"],
    ["..", "odd"],
    ["stable_diffusion", "StableDiffusionSafetyChecker"],
    [None, "AutoencoderKL"],
    ["diffusers"],
    ["diffusers", 3],
    [],
    "odd",
    None,
    {"a": ["diffusers", "AutoencoderKL"]},
)
GARBAGE = (b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe\x00", b"{}", b"[" * 100_000, b'{"a": NaN}')


def mutate(folder: Path, rng: random.Random) -> str:
    """Does one thing to a folder that `save_pretrained` wrote.

    Returns:
        What it was.
    """
    kind = rng.choice(KINDS)
    return f"{kind.__name__}: {kind(folder, rng)}"


def config_value(folder: Path, rng: random.Random, pattern: str = "*/config.json") -> str:
    """A value of a configuration is another."""
    path = rng.choice(sorted(folder.glob(pattern)))
    data = json.loads(path.read_text())
    key, value = rng.choice(sorted(data)), rng.choice(ODD_VALUES)
    path.write_text(json.dumps({**data, key: value}))
    return f"{path.relative_to(folder)} {key} = {value!r}"


def scheduler_value(folder: Path, rng: random.Random) -> str:
    """A value of the scheduler's configuration is another."""
    return config_value(folder, rng, "scheduler/scheduler_config.json")


def config_key(folder: Path, rng: random.Random) -> str:
    """Some keys of a configuration are lost."""
    path = rng.choice(sorted((*folder.glob("*/config.json"), *folder.glob("*/*_config.json"), *folder.glob("*.json"))))
    data = json.loads(path.read_text())
    gone = rng.sample(sorted(data), min(len(data), rng.choice((1, 2, 5))))
    path.write_text(json.dumps({key: value for key, value in data.items() if key not in gone}))
    return f"{path.relative_to(folder)} without {gone}"


def index_entry(folder: Path, rng: random.Random) -> str:
    """A component, or the pipeline, is of another class or module."""
    path = folder / "model_index.json"
    data = json.loads(path.read_text())
    key, value = rng.choice(sorted(data)), rng.choice(CLASSES)
    path.write_text(json.dumps({**data, key: value}))
    return f"{key} = {value!r}"


def garbage(folder: Path, rng: random.Random) -> str:
    """A file holds something else."""
    path, content = rng.choice(_files(folder)), rng.choice(GARBAGE)
    path.write_bytes(content)
    return f"{path.relative_to(folder)} holds {content[:20]!r}"


def truncated(folder: Path, rng: random.Random) -> str:
    """A weight file ends early."""
    path = rng.choice(sorted(folder.glob("*/*.safetensors")))
    size = rng.choice((0, 4, 8, 100, path.stat().st_size // 2, path.stat().st_size - 1))
    path.write_bytes(path.read_bytes()[:size])
    return f"{path.relative_to(folder)} of {size} bytes"


def lost(folder: Path, rng: random.Random) -> str:
    """A file or a folder is not there, or is the other of the two."""
    path = rng.choice([*_files(folder), *sorted(item for item in folder.iterdir() if item.is_dir())])
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    form = rng.choice(("absent", "a folder", "a dangling link", "a file"))
    if form == "a folder":
        path.mkdir()
    elif form == "a dangling link":
        path.symlink_to("nowhere")
    elif form == "a file":
        path.write_text("odd")
    return f"{path.relative_to(folder)} is {form}"


def swapped(folder: Path, rng: random.Random) -> str:
    """Two components change places."""
    one, other = rng.sample(sorted(item for item in folder.iterdir() if item.is_dir()), 2)
    one.rename(folder / "between")
    other.rename(one)
    (folder / "between").rename(other)
    return f"{one.name} and {other.name}"


def tokenizer_file(folder: Path, rng: random.Random) -> str:
    """A file of a tokenizer is lost, or holds garbage, or has an odd value."""
    path = rng.choice(sorted(folder.glob("tokenizer*/*")))
    action: Callable[[], object] = rng.choice(
        (path.unlink, lambda: path.write_bytes(rng.choice(GARBAGE)), lambda: _odd_within(path, rng))
    )
    action()
    return str(path.relative_to(folder))


def weight_header(folder: Path, rng: random.Random) -> str:
    """The header of a weight file says something else."""
    path = rng.choice(sorted(folder.glob("*/*.safetensors")))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    field, value = rng.choice((("shape", [10**12]), ("shape", "x"), ("dtype", "F99"), ("data_offsets", [0, 10**15])))
    header[name][field] = value
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return f"{path.relative_to(folder)} {name} {field} = {value!r}"


def _odd_within(path: Path, rng: random.Random) -> None:
    """Another value somewhere in a JSON file."""
    try:
        data: Any = json.loads(path.read_text())
    except ValueError:
        path.write_bytes(b"odd")
        return
    place = data
    while True:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.6:
            place = place[key]
            continue
        place[key] = rng.choice(ODD_VALUES)
        break
    path.write_text(json.dumps(data))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


KINDS: tuple[Callable[[Path, random.Random], str], ...] = (
    config_value, config_value, config_value, config_key, scheduler_value, scheduler_value, index_entry, index_entry,
    garbage, garbage, truncated, lost, swapped, tokenizer_file, weight_header,
)  # fmt: skip
