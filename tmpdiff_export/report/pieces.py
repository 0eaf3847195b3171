"""Pieces of HTML that several sections of the report are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from calibration.document import Sensitivity
from calibration.records import DepartureRecord, IntervalRecord
from engines.reuse import REUSES, order_of, reused_steps
from tmpdiff_export.display import departures, interval, schedule_strip
from tmpdiff_export.report.svg import places

BY_STEP, ORDER = "by step index", "step indices in order of measuring"
DEPARTURES = "departures"
LEFT = (BY_STEP, ORDER, DEPARTURES, "use", "steps", "checked steps")
"""Headings of columns that are no figures, and stand to the left."""


def strip(found: Sensitivity, schedule: Sequence[str], kind: str = "strip") -> str:
    """A schedule as a row of cells: coloured where a step is computed, hatched where it is reused."""
    place = places(found.precisions)
    cells = "".join(
        f'<i {_look(place, name)} title="step index {index}: {escape(name)}"></i>'
        for index, name in enumerate(schedule)
    )
    return f'<div class="{kind}" role="img" aria-label="{escape(schedule_strip(schedule))}">{cells}</div>'


def _look(place: dict[str, int], choice: str) -> str:
    return f'style="--c:var(--p{place[choice]})"' if order_of(choice) is None else f'class="reused {choice}"'


def choice_keys(found: Sensitivity, schedule: Sequence[str]) -> str:
    """The legend of a strip: how many of its steps there are at each precision, and at each order of reuse."""
    names = {name: precision_name(found, name) for name in found.precisions}
    names |= {name: f'<span class="dot reused {name}"></span>{name}' for name in REUSES}
    return "".join(
        f'<span class="key">{shown}: {schedule.count(name)} of {len(schedule)}</span>'
        for name, shown in names.items()
        if name in schedule
    )


def reuse_note(schedules: Iterable[Sequence[str]]) -> str:
    """What hatched cells of strips are; "" where there are none."""
    if not any(reused_steps(schedule) for schedule in schedules):
        return ""
    return (
        "Hatched steps are reused: their model output is not computed but is the last computed one (reuse0), or lies on the "
        "line (reuse1) or parabola (reuse2) through the last two or three. "
    )


def precision_name(found: Sensitivity, precision: str) -> str:
    """A precision behind a dot of its colour."""
    return f'<span class="dot" style="--c:var(--p{places(found.precisions)[precision]})"></span>{escape(precision)}'


def table(head: Sequence[str], rows: Sequence[str], label: str) -> str:
    """A table that scrolls by itself where it is wider than the page; `rows` are HTML."""
    cells = "".join(f'<th scope="col"{" class=left" if name in LEFT else ""}>{escape(name)}</th>' for name in head)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def typical_cell(typical: IntervalRecord, errors: Sequence[float] = ()) -> str:
    """A table cell with a typical error above its interval; the plain mean of `errors` is its tooltip."""
    value, _, bounds = interval(typical, ".2e").partition(" ")
    mean = f' title="plain mean {sum(errors) / len(errors):.2e}"' if errors else ""
    return f"<td{mean}>{value}{f'<small>{bounds}</small>' if bounds else ''}</td>"


def departures_cell(found: DepartureRecord | None) -> str:
    """A table cell with a dot per departure above their number."""
    if found is None:
        return '<td class="left counted">-</td>'
    words = departures(found)
    dots = f'<span class="dots" role="img" aria-label="{words}">{"<i></i>" * found.count}</span>' if found.count else ""
    counted, _, bounds = words.partition(" [")
    return f'<td class="left counted">{dots}{counted}<small>[{bounds}</small></td>'


def picture(svg: str, label: str, caption: str) -> str:
    """A figure with its description for those who do not see it; `caption` is HTML."""
    return (
        f'<figure><div role="img" aria-label="{escape(label)}">{svg}</div><figcaption>{caption}</figcaption></figure>'
    )
