"""One call per denoiser: prepare, measure the ceilings, then row by row."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tools.gpu_bench.ceilings import measure_ceilings
from tools.gpu_bench.document import Document, error_text
from tools.gpu_bench.machine import facts, gpu_state
from tools.gpu_bench.models import BenchModel, check_output
from tools.gpu_bench.rows import ATTENTION, BASELINE, OWN, Bench, Setting, release
from tools.gpu_bench.timing import time_step
from tools.gpu_bench.work import Work, count_operations, watch_ranges


def measure_model(
    model: BenchModel, rows: Sequence[str], out: Path, device: torch.device, setting: Setting, command: str
) -> bool:
    """Measures `rows`, the 16-bit baseline first and once more at the end, and writes `out` after each.

    Returns:
        Whether all that was tried worked. Rows for which no time was left are marked and do not count.
    """
    begin, seconds_limit = time.perf_counter(), setting.seconds_limit
    # Sana's linear attention multiplies in FP32; TF32 for it, in every row, as Inductor advises.
    torch.set_float32_matmul_precision("high")
    document = Document(out, {"command": command, "machine": facts(device), "rows": {}})
    bench = prepare(model, device, setting, document)
    say(begin, "denoiser ready")
    document.put("ceilings", bench.ceilings)
    say(begin, "ceilings measured")
    good = True
    longest = 0.0
    for row in rows:
        left = seconds_limit - (time.perf_counter() - begin)
        if row != BASELINE and left < 1.2 * longest:
            text = f"skipped: {left:.0f} s of {seconds_limit:.0f} s left, the longest row took {longest:.0f} s"
            result: dict[str, Any] = {"status": "skipped", "error_text": text}
        else:
            started = time.perf_counter()
            result = _attempt(bench, row)
            longest = max(longest, time.perf_counter() - started) if row != BASELINE else longest
            result["row_s"] = time.perf_counter() - started
        good = good and result["status"] != "failed" and "part_errors" not in result
        document.put(row, result, inside="rows")
        say(begin, f"{row}: {in_words(result)}")
        release()
        if row == BASELINE and bench.baseline is None:
            say(begin, "no row can be compared without the baseline; the others are not tried")
            return False
    good = _finish(bench, rows, document, begin + seconds_limit) and good
    document.put("seconds", time.perf_counter() - begin)
    return good


def prepare(model: BenchModel, device: torch.device, setting: Setting, document: Document) -> Bench:
    """Builds the denoiser; one eager call per input set gives references, ranges and operations."""
    module = model.build(device, tiny=setting.tiny)
    input_sets = model.input_sets(module, device, tiny=setting.tiny)
    work = Work()
    references = []
    with torch.no_grad(), watch_ranges(module, work):
        for index, inputs in enumerate(input_sets):
            if index == 0:
                with count_operations(module, work):
                    output = module(**inputs, return_dict=False)[0]
            else:
                output = module(**inputs, return_dict=False)[0]
            references.append(output.clone())
    rms = [check_output(item, model.title) for item in references]
    bench = Bench(model, module, input_sets, work, references, setting)
    sizes = model.tiny_sizes if setting.tiny else model.sizes
    document.put(
        "model",
        {
            "name": model.name,
            "title": model.title,
            "class": model.denoiser_class,
            "tiny": setting.tiny,
            "config": dict(model.tiny if setting.tiny else model.config),
            "dtype": str(model.dtype).removeprefix("torch."),
            "batch": sizes.batch,
            "latent_side": sizes.side,
            "text_tokens": sizes.text_tokens,
            "parameters": sum(item.numel() for item in module.parameters()),
            "stored_elements": sum(item.numel() for item in module.state_dict().values()),
            "published_elements": model.published,
            "compiled_block_classes": list(model.blocks),
            "compile_backend": setting.backend,
            "torchao_sets_inductor_options": setting.torchao_recommended,
            "output_rms": rms,
            "weights": "random, normal, variance 1 / fan-in",
            "input_sets": len(input_sets),
        },
    )
    document.put(
        "work",
        {
            "flops": work.totals(),
            "attention": {"x".join(map(str, shape)): count for shape, count in work.attention.items()},
        },
    )
    bench.ceilings = measure_ceilings(work, device, model.dtype, tiny=setting.tiny)
    release()
    return bench


def _attempt(bench: Bench, row: str) -> dict[str, Any]:
    try:
        return bench.measure(row)
    except Exception as error:  # one row's failure, a compiler's or a kernel's, leaves the others their time
        return {"status": "failed", "error_text": error_text(error)}


def _finish(bench: Bench, rows: Sequence[str], document: Document, deadline: float) -> bool:
    """The baseline once more, resident engines, and the state of the GPU, each if there is time."""
    good = True
    baseline = bench.baseline
    assert baseline is not None
    parts = {
        "baseline_again": lambda: time_step(baseline, None, max(1, bench.setting.repeats // 3), 2)["step"],
        "residents": lambda: bench.residents(
            [row for row in rows if row == BASELINE or (row in OWN and row not in ATTENTION)]
        ),
        "gpu_state_at_end": gpu_state,
    }
    for name, measure in parts.items():
        if time.perf_counter() > deadline:
            document.put(name, None)
            continue
        try:
            document.put(name, measure())
        except Exception as error:
            good = False
            document.put(name, {"status": "failed", "error_text": error_text(error)})
            print(f"{name} failed: {error_text(error)}", file=sys.stderr, flush=True)
    return good


def in_words(result: dict[str, Any]) -> str:
    """A row on one line."""
    if result["status"] != "ok":
        return f"{result['status']}: {result['error_text']}"
    words = f"{result['step']['median_ms']:.2f} ms"
    if "speedup" in result:
        words += f", {result['speedup']:.3f} x 16-bit beside it"
    if result["over_floor"] is not None:
        words += f", {result['over_floor']:.2f} x floor"
    if result["error"]["sqnr_db"] is not None:
        words += f", {result['error']['sqnr_db']:.1f} dB"
    words += f" (compiled in {result['compile_s']:.0f} s)"
    return words + "".join(f"; {part} failed: {text}" for part, text in result.get("part_errors", {}).items())


def say(begin: float, text: str) -> None:
    """A line of progress with the seconds since `begin`."""
    print(f"[{time.perf_counter() - begin:5.0f} s] {text}", flush=True)
