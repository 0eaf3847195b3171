"""The document form of a sampler table (`sampler.json`): field names, types, format version.

What the fields mean together (lengths, index ranges) is checked by `engines.sampler.SamplerTable`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from engines.documents import one_line
from engines.errors import SamplerError

SAMPLER_VERSION = 1

TermsDocument = tuple[tuple[int, float], ...]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class RowDocument(_Strict):
    """One row: (step index, coefficient) pairs over samples and over model outputs."""

    samples: TermsDocument
    outputs: TermsDocument


class SamplerDocument(_Strict):
    """Every field of the document, as `SamplerTable` names them; numbers are finite."""

    version: Literal[1]
    scheduler: str
    num_inference_steps: int
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...] | None
    init_noise_sigma: float
    input_scale: tuple[float, ...]
    rows: tuple[RowDocument, ...]


class _Versioned(BaseModel):
    model_config = ConfigDict(strict=True)

    version: int


def parse_document(text: str | bytes) -> SamplerDocument:
    """Reads the JSON text of a document.

    Raises:
        SamplerError: not JSON, a newer version, missing, unknown or mistyped fields, or NaN and infinity.
    """
    try:
        found = _Versioned.model_validate_json(text).version
        if found > SAMPLER_VERSION:
            raise SamplerError(
                f"sampler table has format version {found}, this release reads up to {SAMPLER_VERSION}; "
                "upgrade tmpdiff-export"
            )
        return SamplerDocument.model_validate_json(text)
    except ValidationError as error:
        raise SamplerError(f"sampler table is malformed: {one_line(error)}; build the bundle again") from error
