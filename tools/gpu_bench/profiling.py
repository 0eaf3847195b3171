"""Where a step's time goes: its kernels, grouped, so that a missed goal can be explained."""

from __future__ import annotations

import re
from typing import Any

import torch

from tools.gpu_bench.step import Step

TOP = 25
# First match wins. Inductor names its own kernels triton_<kind>_fused_<operations>: "tem" are products, and of the
# others the names list operations that are long done elsewhere, such as the product whose bias they add.
_CLASSES = (
    ("gemm", r"^triton_tem"),
    ("norm", r"^triton_.*(norm|rsqrt|welford|var_mean)"),
    ("elementwise or quantize", r"^triton_"),
    ("attention", r"flash|fmha|sdpa|attention|cudnn.*(mha|attn)"),
    ("convolution", r"conv|fprop|implicit|winograd"),
    ("gemm", r"gemm|nvjet|cutlass|cublas|matmul|_int8_linear|splitk|xmma|wgmma|(^|_|::)(add|b)?mm($|_)|scaled_mm"),
    ("norm", r"norm|welford"),
    ("copy", r"memcpy|memset|copy|(^|::|_)cat(_|$)|catarray|transpose|permute"),
    ("elementwise or quantize", r"elementwise|_gelu_codes|_geglu|vectorized|reduce|aten::|index|fill"),
)


def kernel_class(name: str) -> str:
    """The group of a kernel, by its name."""
    lowered = name.lower()
    return next((group for group, pattern in _CLASSES if re.search(pattern, lowered)), "other")


def _is_annotation(item: Any) -> bool:
    """Whether an entry is a named range, which would count the kernels inside once more."""
    return bool(getattr(item, "is_user_annotation", False)) or bool(
        re.match(r"Torch-Compiled Region|TorchDynamo|## Call|Activity Buffer|ProfilerStep", str(item.key))
    )


def profile_step(step: Step) -> dict[str, Any]:
    """Profiles one step launched kernel by kernel.

    Returns:
        `total_ms` of kernels, `classes` (ms by group), `kernels` (the 25 with the most time: name, class, calls, ms).
    """
    cuda = step.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    step.call()
    step.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        step.call()
        step.synchronize()
    rows = []
    for item in profiler.key_averages():
        on_device = str(item.device_type).endswith("CUDA")
        if on_device is cuda and not _is_annotation(item):
            total_us = item.self_device_time_total if cuda else item.self_cpu_time_total
            rows.append((float(total_us) / 1e3, str(item.key), int(item.count)))
    rows.sort(reverse=True)
    classes: dict[str, float] = {}
    for spent_ms, name, _ in rows:
        classes[kernel_class(name)] = classes.get(kernel_class(name), 0.0) + spent_ms
    return {
        "total_ms": sum(spent_ms for spent_ms, _, _ in rows),
        "classes": dict(sorted(classes.items(), key=lambda item: -item[1])),
        "kernels": [
            {"name": name[:160], "class": kernel_class(name), "calls": calls, "ms": spent_ms}
            for spent_ms, name, calls in rows[:TOP]
        ],
    }
