"""Result files as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.gpu_bench.document import read_result


def tables(paths: Sequence[Path]) -> str:
    """The tables of some result files, in their order."""
    parts = []
    for path in paths:
        content = read_result(path)
        parts += link_tables(content) if "link" in content else model_tables(content)
    return "\n\n".join(parts)


def model_tables(content: dict[str, Any]) -> list[str]:
    """Steps, resident engines and profiles of one denoiser."""
    if "model" not in content:
        return [f"No denoiser was measured: `{content['command']}`."]
    model = content["model"]
    parts = [f"### {model['title']}", setting_words(content), steps_table(content), *failures(content)]
    residents = content.get("residents")
    if isinstance(residents, list) and len(residents) > 1:
        parts.append(residents_table(residents, content["rows"]))
    for name, row in content["rows"].items():
        if "profile" in row:
            parts.append(profile_table(name, row["profile"]))
    return parts


def setting_words(content: dict[str, Any]) -> str:
    """What was measured where, in one paragraph."""
    model, machine = content["model"], content["machine"]
    libraries = ", ".join(f"{name} {number}" for name, number in machine["libraries"].items() if number)
    driver = (machine.get("driver") or {}).get("driver_version")
    where = machine["gpu"] or "CPU"
    flops = sum(content["work"]["flops"].values())
    words = (
        f"{where}{f', driver {driver}' if driver else ''}, {libraries}; {machine['date']}. {model['parameters'] / 1e9:.2f} B "
        f"parameters in {model['dtype']}, batch {model['batch']}, {model['text_tokens']} text tokens, "
        f"{flops / 1e12:.4g} TFLOP a step ({_shares(content['work']['flops'])})."
    )
    ceilings = content.get("ceilings")
    if ceilings:
        rates = ", ".join(
            f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in ceilings["product_flops"].items() if rate is not None
        )
        attention = [rate for rate in ceilings["attention_flops"].values() if rate is not None]
        if attention:
            rates += f", attention at its largest shape {attention[0] / 1e12:.0f} TFLOP/s"
        words += f" Measured ceilings: {rates}, copies {ceilings['bandwidth'] / 1e9:.0f} GB/s."
    again, first = content.get("baseline_again"), content["rows"].get("16-bit", {}).get("step")
    if first and again and "median_ms" in again:
        words += f" The baseline again at the end: {again['median_ms']:.2f} ms after {first['median_ms']:.2f} ms."
    return words


def steps_table(content: dict[str, Any]) -> str:
    """One line per measured row."""
    header = (
        "row", "step ms (quartiles)", "16-bit ms beside it", "speed-up", "SQNR dB", "weights GB", "scratch GB",
        "floor ms", "measured / floor", "quantized linears",
    )  # fmt: skip
    lines = []
    for name, row in content["rows"].items():
        if row["status"] != "ok":
            continue
        low, high = row["step"]["quartiles_ms"]
        beside = row.get("beside", {}).get("median_ms")
        total = row["quantized_layers"] + row["kept_layers"].get("recipe", 0) + _by_size(row["kept_layers"])
        lines.append(
            (
                f"{content['model']['dtype']} (16-bit)" if name == "16-bit" else name,
                f"{row['step']['median_ms']:.2f} ({low:.2f} to {high:.2f})",
                _number(beside, ".2f"),
                _number(row.get("speedup"), ".3f"),
                _number(row["error"]["sqnr_db"], ".1f"),
                _number(row["weights_bytes"] / 1e9, ".2f"),
                _number(None if row["scratch_bytes"] is None else row["scratch_bytes"] / 1e9, ".2f"),
                _number(row["floor"]["floor_ms"], ".2f"),
                _number(row["over_floor"], ".2f"),
                f"{row['quantized_layers']} of {total}" if row["quantized_layers"] else "-",
            )
        )
    return _table(header, lines)


def failures(content: dict[str, Any]) -> list[str]:
    """Rows without a measurement and why, as a list, if there are any."""
    lines = [
        f"- {name}: {row['status']}: {row['error_text']}"
        for name, row in content["rows"].items()
        if row["status"] != "ok"
    ]
    for name, row in content["rows"].items():
        lines += [f"- {name}: {part} failed: {text}" for part, text in row.get("part_errors", {}).items()]
    return ["\n".join(lines)] if lines else []


def residents_table(residents: Sequence[dict[str, Any]], rows: dict[str, Any]) -> str:
    """Memory of two and more engines; the scratch of the largest step is shared by all."""
    scratch = [row["scratch_bytes"] for row in rows.values() if row.get("scratch_bytes") is not None]
    extra = max(scratch, default=0)
    header = (
        "resident engines", "weights GB measured, unquantized layers shared", "weights GB computed, all separate",
        "with one shared scratch GB",
    )  # fmt: skip
    lines = [
        (
            ", ".join(item["engines"]),
            _number(None if item["allocated_bytes"] is None else item["allocated_bytes"] / 1e9, ".2f"),
            _number(item["separate_bytes"] / 1e9, ".2f"),
            _number((item["allocated_bytes"] or item["shared_bytes"]) / 1e9 + extra / 1e9, ".2f"),
        )
        for item in residents
    ]
    return _table(header, lines)


def profile_table(name: str, profile: dict[str, Any]) -> str:
    """Kernel groups of a row, and its ten longest kernels."""
    total = profile["total_ms"]
    groups = [(group, f"{spent:.2f}", f"{spent / total:.1%}") for group, spent in profile["classes"].items()]
    kernels = [
        (f"`{item['name'][:80]}`", item["class"], str(item["calls"]), f"{item['ms']:.2f}")
        for item in profile["kernels"][:10]
    ]
    return "\n\n".join(
        (
            f"Kernels of {name}, {total:.2f} ms in all:",
            _table(("group", "ms", "share"), groups),
            _table(("kernel", "group", "calls", "ms"), kernels),
        )
    )


def link_tables(content: dict[str, Any]) -> list[str]:
    """The link, and computed costs of bringing engines in."""
    where = content["machine"]["gpu"] or "CPU"
    parts = [
        f"### Host-to-device link, {where}",
        _table(
            ("MiB", "GB/s in", "GB/s out"),
            [
                (str(item["bytes"] / 2**20), f"{item['to_device'] / 1e9:.1f}", f"{item['to_host'] / 1e9:.1f}")
                for item in content["link"]
            ],
        ),
    ]
    both = content.get("overlap")
    if both:
        parts.append(
            f"A product of side {both['side']} takes {both['product_ms']:.3f} ms alone and "
            f"{both['product_beside_copy_ms']:.3f} ms while weights come in; the copy of {both['bytes'] / 1e9:.2f} GB "
            f"{both['copy_ms']:.1f} ms alone and {both['copy_beside_products_ms']:.1f} ms beside products."
        )
    if content.get("bring_in"):
        header = ("denoiser", "engine", "all weights ms", "unshared weights ms", "its step ms", "not hidden ms")
        lines = [
            (
                item["model"], item["row"], f"{item['weights_ms']:.1f}", f"{item['own_ms']:.1f}",
                f"{item['step_ms']:.2f}", f"{item['exposed_ms']:.1f}",
            )
            for item in content["bring_in"]
        ]  # fmt: skip
        parts.append("Computed from the fastest copy, not measured:\n\n" + _table(header, lines))
    return parts


def _by_size(kept: dict[str, int]) -> int:
    return sum(count for reason, count in kept.items() if reason.startswith("size"))


def _shares(flops: dict[str, int]) -> str:
    total = sum(flops.values())
    return ", ".join(f"{name.replace('_', ' ')} {count / total:.0%}" for name, count in flops.items() if count)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
