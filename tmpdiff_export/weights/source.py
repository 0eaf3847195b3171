"""The weights of a pipeline's component, as its folder stores them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engines.errors import BuildError, first_line
from engines.files import sha256_bytes, sha256_file, side_by_side
from tmpdiff_export.weights.files import Place, places

_TRANSFORMERS = "model"
_STEMS = ("diffusion_pytorch_model", _TRANSFORMERS)
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class SourceWeights:
    """The tensors of a component's folder; nothing of them is in memory.

    Attributes:
        folder: the component's folder.
        places: where each tensor lies, by name.
        files: its weight files and its configuration, sorted.
        variant: of the files, as `save_pretrained(variant=)` names it; None for files without one.
    """

    folder: Path
    places: Mapping[str, Place]
    files: tuple[Path, ...]
    variant: str | None = None

    @classmethod
    def open(cls, folder: Path, variant: str | None = None) -> SourceWeights:
        """Reads the headers of a component's weight files.

        Args:
            folder: as `save_pretrained` writes it, with one safetensors file or several and their index.
            variant: taken where the folder holds it. Otherwise the files without variant are, and without them the
                only variant that is there.

        Raises:
            BuildError: it holds no safetensors files, several variants to choose from, or a file that is missing or
                damaged.
        """
        try:
            files, chosen = _weight_files(folder, variant)
            found = {name: place for path in files for name, place in places(path).items()}
            configuration = sorted(path for path in folder.iterdir() if path.suffix == ".json")
        except OSError as error:
            where = error.filename or folder
            raise BuildError(
                f"weights in {folder} cannot be read: {where}: {error.strerror or error}; save the pipeline again"
            ) from error
        return cls(folder, found, tuple(sorted((*configuration, *files))), chosen)

    @property
    def parameters(self) -> int:
        """How many numbers there are."""
        return sum(place.size_bytes // place.dtype.itemsize for place in self.places.values())

    @property
    def dtype(self) -> torch.dtype:
        """The floating type that most of the numbers have; float32 where there is none."""
        counts: Counter[torch.dtype] = Counter()
        for place in self.places.values():
            if place.dtype.is_floating_point:
                counts[place.dtype] += place.size_bytes // place.dtype.itemsize
        return counts.most_common(1)[0][0] if counts else torch.float32

    def read(self, name: str) -> torch.Tensor:
        """A tensor in its stored dtype, on the CPU, in memory of its own."""
        return self.places[name].read()

    def require_numbers(self, module: torch.nn.Module) -> None:
        """Refuses integers where a module has floating-point numbers.

        Raises:
            BuildError: naming a tensor.
        """
        for name, wanted in (*module.named_parameters(), *module.named_buffers()):
            found = self.places.get(name)
            if found is not None and wanted.is_floating_point() and not found.dtype.is_floating_point:
                raise BuildError(
                    f"{name} in {found.path} holds numbers of type {found.dtype}, expected floating-point ones; build from "
                    "the pipeline as it was published in 16 bit"
                )

    def require_names(self, module: torch.nn.Module, what: str) -> None:
        """Refuses weights that a library would find under names of an older release; here they are read by name.

        Args:
            module: whose parameters they are to be.
            what: the module, for the message.

        Raises:
            BuildError: naming one that is missing.
        """
        names = [name for name, _ in module.named_parameters()]
        missing = [name for name in names if name not in self.places]
        if missing:
            raise BuildError(
                f"weights in {self.folder} lack {len(missing)} of the {len(names)} parameters of {what}, first "
                f"{missing[0]}; load the pipeline with the installed diffusers and save it anew"
            )

    def sha256(self) -> str:
        """Hash over names and content of the files."""
        digests = side_by_side(self.files, sha256_file)
        lines = (f"{path.name} {digest}\n" for path, digest in zip(self.files, digests, strict=True))
        return sha256_bytes("".join(lines).encode())


def folder_json(path: Path) -> Any:
    """What a JSON file of a pipeline's folder holds; NaN and infinities, which configurations have, among it.

    Raises:
        FileNotFoundError: it does not exist.
        BuildError: it is no JSON.
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BuildError(f"{path} is not valid JSON: {first_line(error)}; save the pipeline again") from error


def variants(folder: Path) -> set[str | None]:
    """The variants of weights that a component's folder holds, None for files without one.

    Raises:
        OSError: it cannot be read.
    """
    names = [path.name for path in folder.iterdir()]
    patterns = [rf"{stem}(?:\.(.+))?\.safetensors" for stem in _STEMS]
    patterns += [rf"{stem}\.safetensors\.index(?:\.(.+))?\.json" for stem in _STEMS]
    found = [match for name in names for pattern in patterns if (match := re.fullmatch(pattern, name))]
    return {match[1] for match in found if not _SHARD.search(match[1] or "")}


def _weight_files(folder: Path, asked: str | None) -> tuple[tuple[Path, ...], str | None]:
    """The weight files of a component, and their variant."""
    found = variants(folder)
    if not found:
        raise BuildError(
            f"folder {folder} holds none of {', '.join(f'{stem}.safetensors' for stem in _STEMS)}; save the pipeline with "
            "save_pretrained(safe_serialization=True): other files of weights are not read, because loading them runs code"
        )
    if asked in found:
        chosen = asked
    elif None in found:
        chosen = None
    elif len(found) == 1:
        (chosen,) = found
    else:
        raise BuildError(
            f"weights in {folder} are there in the variants {', '.join(sorted(map(str, found)))}; choose one with --variant"
        )
    return _files_of(folder, chosen), chosen


def _files_of(folder: Path, variant: str | None) -> tuple[Path, ...]:
    inserted = "" if variant is None else f".{variant}"
    for stem in _STEMS:
        index = folder / f"{stem}.safetensors.index{inserted}.json"
        single = folder / f"{stem}{inserted}.safetensors"
        if index.exists() and not (stem == _TRANSFORMERS and single.exists()):  # of both it loads the single file
            try:
                names = set(folder_json(index)["weight_map"].values())
                if not names or any(Path(name).name != name or "\0" in name for name in names):
                    raise ValueError("it names no files, or files of other folders")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise BuildError(
                    f"{index} does not say where the weights are: {error}; save the pipeline again"
                ) from error
            return tuple(folder / name for name in sorted(names))
        if single.exists():
            return (single,)
    raise BuildError(f"weights of the variant {variant} in {folder} are links to nowhere; save the pipeline again")
