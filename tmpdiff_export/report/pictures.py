"""Pictures of the report: the same prompts at every precision, and heat maps of where they differ."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
import numpy as np
from PIL import Image

from calibration.measure.metrics import picture_mse, picture_ssim, psnr_db
from engines.bundle import Bundle
from engines.runtime import DenoiseRuntime
from engines.setting_choice import SettingChoice
from engines.setting_entry import SettingEntry
from tmpdiff_export.display import Report, number

SCHEDULE = "schedule"

HEAT_LEVELS = 16
"""Difference in grey levels that has the brightest colour of a heat map; the same in every report."""


@dataclass(frozen=True)
class Drawing:
    """One prompt and starting noise drawn with one schedule, and how far it is from the reference's picture.

    Attributes:
        name: a precision for its uniform schedule, or "schedule".
        picture: uint8 [H, W, 3].
        difference: mean absolute difference from the reference over the colours, float32 [H, W], grey levels.
        ssim: structural similarity to the reference.
        psnr_db: PSNR against the reference, None where the pictures are identical.
    """

    name: str
    picture: np.ndarray
    difference: np.ndarray
    ssim: float
    psnr_db: float | None


@dataclass(frozen=True)
class Row:
    """All drawings of one prompt and starting noise, the reference first."""

    prompt: str
    seed: int
    drawings: tuple[Drawing, ...]


def draw(
    bundle: Bundle, setting: SettingEntry, prompts: Sequence[str], count: int, progress: Report | None = None
) -> tuple[Row, ...]:
    """Draws every prompt `count` times at each uniform precision and with the calibrated schedule.

    Raises:
        TmpDiffError: a file of the bundle is damaged.
    """
    with DenoiseRuntime(bundle, setting=SettingChoice(named=setting.name)) as runtime:
        schedules = {
            **{name: bundle.schedule(setting, f"uniform:{name}") for name in runtime.precisions},
            SCHEDULE: bundle.schedule(setting),
        }
        total = len(prompts) * count * len(schedules)
        rows: list[Row] = []
        for prompt in prompts:
            for seed in range(count):
                drawn: dict[str, np.ndarray] = {}
                for name, schedule in schedules.items():
                    drawn[name] = runtime.generate([prompt], [seed], schedule)[0]
                    if progress:
                        progress("pictures", len(rows) * len(schedules) + len(drawn), total)
                reference = drawn[runtime.precisions[0]]
                rows.append(Row(prompt, seed, tuple(compare(name, drawn[name], reference) for name in schedules)))
        return tuple(rows)


def compare(name: str, picture: np.ndarray, reference: np.ndarray) -> Drawing:
    """A picture, uint8 [H, W, 3], with its distance from the reference's."""
    return Drawing(
        name=name,
        picture=picture,
        difference=np.abs(picture.astype(np.float32) - reference).mean(axis=-1),
        ssim=picture_ssim(picture, reference),
        psnr_db=psnr_db([picture_mse(picture, reference)]),
    )


def pictures_section(rows: Sequence[Row], reference: str) -> str:
    """HTML of the drawings and their heat maps.

    Args:
        rows: from `draw`; without any the section says how to get some.
        reference: the precision that the others are compared with.
    """
    lead = '<p class="lead">The same prompt and starting noise at every precision, and where the pictures differ.</p>'
    if not rows:
        return f"{lead}<p>No pictures were asked for; <code>--prompt TEXT</code> draws some.</p>"
    parts = [lead]
    for row in rows:
        cards = []
        for drawn in row.drawings:
            name = drawn.name if drawn.name == SCHEDULE else f"uniform {drawn.name}"
            same = not drawn.difference.any()
            heat = _png(_heat(drawn.difference))
            figures = "identical" if same else f"SSIM {drawn.ssim:.4f}<br>PSNR {number(drawn.psnr_db, '.1f')} dB"
            if drawn.name == reference:
                figures = "reference"
            cards.append(
                f'<figure><img src="{_png(Image.fromarray(drawn.picture))}" alt="{escape(row.prompt)}, {escape(name)}">'
                f'<img src="{heat}" alt="difference of {escape(name)} from {escape(reference)}">'
                f"<figcaption><b>{escape(name)}</b><br>{figures}</figcaption></figure>"
            )
        parts.append(f'<h3>{escape(row.prompt)} (seed {row.seed})</h3><div class="drawn">{"".join(cards)}</div>')
    parts.append(
        f'<p class="note">Below each picture: its mean absolute difference from the {escape(reference)} picture, '
        f'0 <span class="ramp"></span> {HEAT_LEVELS} grey levels of 255 or more.</p>'
    )
    return "".join(parts)


def palette() -> np.ndarray:
    """The colours of the heat maps, uint8 [256, 3], from black over purple to pale yellow."""
    return np.array(matplotlib.colormaps["inferno"](np.arange(256), bytes=True)[:, :3])


def _heat(difference: np.ndarray) -> Image.Image:
    """Differences in grey levels, [H, W], as a picture with `palette`."""
    levels = np.rint(np.clip(difference / HEAT_LEVELS, 0, 1) * 255).astype(np.uint8)
    image = Image.fromarray(levels, mode="P")
    image.putpalette(palette().tobytes())
    return image


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
