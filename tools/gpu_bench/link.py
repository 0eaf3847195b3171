"""The link between host and device memory, and what it means for engines that are not resident."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tools.gpu_bench.document import Document, read_result
from tools.gpu_bench.machine import facts
from tools.gpu_bench.timing import best_seconds

SIZES = (16 << 20, 256 << 20, 2 << 30)
TINY_SIZES = (1 << 16, 1 << 20)


def measure_link(out: Path, results: Sequence[Path], device: torch.device, command: str, *, tiny: bool) -> bool:
    """Measures the link and computes the cost of bringing the engines of `results` in.

    Returns:
        Whether everything was measured.
    """
    known = [read_result(path) for path in results]
    document = Document(out, {"command": command, "machine": facts(device)})
    sizes = TINY_SIZES if tiny else SIZES
    document.put("link", [bandwidth(size, device) for size in sizes])
    side = 256 if tiny else 8192
    document.put("overlap", overlap(sizes[-1], side, device))
    fastest = max(item["to_device"] for item in document.content["link"])
    document.put("bring_in", [line for result in known for line in bring_in(result, fastest)])
    for item in document.content["link"]:
        print(f"{item['bytes'] >> 20} MiB: {item['to_device'] / 1e9:.1f} GB/s in, {item['to_host'] / 1e9:.1f} GB/s out")
    return True


def bandwidth(size: int, device: torch.device) -> dict[str, Any]:
    """Bytes per second of copies of `size` bytes between pinned host memory and the device, each way."""
    host = _host(size, device)
    on_device = torch.empty(size, dtype=torch.uint8, device=device)
    calls = max(1, min(8, (1 << 30) // size))
    inward = best_seconds(lambda: on_device.copy_(host, non_blocking=True), device, calls=calls, rounds=3)
    outward = best_seconds(lambda: host.copy_(on_device, non_blocking=True), device, calls=calls, rounds=3)
    return {"bytes": size, "pinned": device.type == "cuda", "to_device": size / inward, "to_host": size / outward}


def overlap(size: int, side: int, device: torch.device) -> dict[str, Any] | None:
    """16-bit products alone and while weights are copied in on another stream; None on a CPU.

    Returns:
        `product_ms` and `product_beside_copy_ms` of one product, `copy_ms` and `copy_beside_products_ms`.
    """
    if device.type != "cuda":
        return None
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    host, target = _host(size, device), torch.empty(size, dtype=torch.uint8, device=device)
    alone = best_seconds(lambda: torch.mm(a, b), device)
    copy_alone = best_seconds(lambda: target.copy_(host, non_blocking=True), device, calls=1, rounds=3)
    products = max(1, int(0.8 * copy_alone / alone))  # all of them run while the copy does
    stream = torch.cuda.Stream()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        marks[0].record()
        target.copy_(host, non_blocking=True)
        marks[1].record()
    marks[2].record()
    for _ in range(products):
        torch.mm(a, b)
    marks[3].record()
    torch.cuda.synchronize()
    return {
        "side": side,
        "bytes": size,
        "products": products,
        "product_ms": 1e3 * alone,
        "product_beside_copy_ms": marks[2].elapsed_time(marks[3]) / products,
        "copy_ms": 1e3 * copy_alone,
        "copy_beside_products_ms": marks[0].elapsed_time(marks[1]),
    }


def bring_in(result: dict[str, Any], bytes_per_second: float) -> list[dict[str, Any]]:
    """Computed, not measured: time to bring each engine of a result file in, against its step.

    Returns:
        Per row: `weights_ms` to copy all weights, `own_ms` to copy those it does not share with the 16-bit engine,
        `step_ms`, and `exposed_ms`, what remains of `weights_ms` where one step of the 16-bit engine hides the copy.
    """
    rows = {name: row for name, row in result["rows"].items() if row["status"] == "ok"}
    hidden = rows["16-bit"]["step"]["median_ms"] if "16-bit" in rows else 0.0
    lines = []
    for name, row in rows.items():
        whole_ms = 1e3 * row["weights_bytes"] / bytes_per_second
        lines.append(
            {
                "computed": True,
                "model": result["model"]["title"],
                "row": name,
                "weights_ms": whole_ms,
                "own_ms": 1e3 * row["own_bytes"] / bytes_per_second,
                "step_ms": row["step"]["median_ms"],
                "exposed_ms": max(0.0, whole_ms - hidden),
            }
        )
    return lines


def _host(size: int, device: torch.device) -> torch.Tensor:
    """Host memory with content; pinned for a GPU."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return host.fill_(37)
