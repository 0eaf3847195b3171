"""The fixed-edge policy that checkpoints carry for other runtimes: the first N and the last M steps in 16 bit.

It stands in a quantized checkpoint's `transformer/config.json` as `quantization_config.runtime.diffusion_step_policy`
(schema version 1, type "first_last_n") and is read by vLLM-Omni, SGLang, TensorRT-LLM and diffusers for Cosmos3. Its
fields, all required: `schema_version`, `type`, `index_space`, `scope`, `default_mode`, `first_steps` and `last_steps`
(each `count` and `mode`), `overlap`, `reasoner`. "native" is the checkpoint's own format, named by `quant_algo` beside
`runtime`; "a16" is 16-bit activations.

A policy counts the scheduler's steps. A scheduler that calls the denoiser twice in a step (Heun, KDPM2) has both calls
at one precision: a correction at another precision than the prediction that it corrects is no policy.

One difference is not bridged: an "a16" step there keeps its quantized weights (W8A16, W4A16), because one checkpoint
serves both kinds of step. Here it becomes a step at the reference, 16-bit weights included.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.choose.stored_prediction import StoredPrediction
from engines.documents import read_json
from engines.errors import ScheduleError
from engines.files import atomic_write_text
from engines.precision import Precision
from engines.reuse import reused_steps
from engines.sampler import SamplerTable

PLACE = ("quantization_config", "runtime", "diffusion_step_policy")
FORMATS = {"FP8": Precision.FP8.value, "NVFP4": Precision.NVFP4.value}
"""`quant_algo` of checkpoints whose readers know step policies, and the precision here."""

COMPONENT = "transformer"
LATENCY_TOLERANCE = 1e-9

_FIXED: dict[str, Any] = {
    "schema_version": 1,
    "type": "first_last_n",
    "index_space": "denoising_loop_iteration",
    "default_mode": "native",
    "overlap": "a16",
}
_FIELDS = {*_FIXED, "scope", "first_steps", "last_steps", "reasoner"}


@dataclass(frozen=True)
class StepPolicy:
    """The first `first_steps` and the last `last_steps` steps in 16 bit, the others at the native precision."""

    first_steps: int
    last_steps: int

    def precisions(self, calls: Sequence[int], reference: str, native: str) -> tuple[str, ...]:
        """One precision per call of the denoiser. Windows may overlap; a loop of one step is native, as its readers have it.

        Args:
            calls: of every step of the scheduler, from `calls_of_steps`.
            reference: precision of the first and last steps.
            native: of the others.
        """
        steps = len(calls)
        high = [steps > 1 and (k < self.first_steps or k >= steps - self.last_steps) for k in range(steps)]
        return tuple(
            reference if edge else native for edge, count in zip(high, calls, strict=True) for _ in range(count)
        )

    def described(self, calls: Sequence[int], reference: str, native: str) -> str:
        """What it says, and what that comes to where it is not the same."""
        text = f"step policy: first {self.first_steps} and last {self.last_steps} at {reference}"
        if len(calls) == 1 and self.first_steps + self.last_steps:
            text += f"; the only step is at {native}, as readers of policies have it"
        elif max(calls) > 1:
            text += f", in steps of up to {max(calls)} calls"
        return text


@dataclass(frozen=True)
class Nearest:
    """A policy in place of a schedule that is none, with what a calibration predicts for it."""

    policy: StepPolicy
    native: str
    predicted_error: float
    predicted_latency: float


def read_policy(path: Path) -> tuple[StepPolicy, str | None]:
    """Reads the policy of a checkpoint's config.

    Args:
        path: `transformer/config.json`, or what `write_policy` wrote.

    Returns:
        The policy, and the precision that `quant_algo` names, None where it names none of `FORMATS`.

    Raises:
        ScheduleError: there is no policy, or one that says something else than "first N and last M steps".
    """
    config = read_json(path, "config", ScheduleError)
    found: Any = config
    for key in PLACE:
        if not isinstance(found, Mapping) or key not in found:
            raise ScheduleError(f"config {path} holds no {'.'.join(PLACE)}: {key} is missing")
        found = found[key]
    return _parse(found, path), FORMATS.get(str(config["quantization_config"].get("quant_algo")))


def write_policy(path: Path, policy: StepPolicy, native: str) -> None:
    """Writes a policy as the fragment of `transformer/config.json` it is, to be merged into the checkpoint's own.

    `reasoner` gets "a16", which is the readers' default; a schedule says nothing about that part of a model.

    Raises:
        ScheduleError: no reader of policies runs `native`.
    """
    algorithms = {precision: name for name, precision in FORMATS.items()}
    if native not in algorithms:
        raise ScheduleError(
            f"step policies are for {' and '.join(algorithms)} checkpoints, the schedule's low precision is {native}; "
            "choose a schedule of one of those"
        )
    document = _FIXED | {
        "scope": [COMPONENT],
        "first_steps": {"count": policy.first_steps, "mode": "a16"},
        "last_steps": {"count": policy.last_steps, "mode": "a16"},
        "reasoner": "a16",
    }
    config = {
        "quantization_config": {
            "quant_algo": algorithms[native],
            "runtime": {"diffusion_step_policy": document},
        }
    }
    atomic_write_text(path, json.dumps(config, indent=2) + "\n")


def calls_of_steps(table: SamplerTable) -> tuple[int, ...]:
    """How often every step of a scheduler calls the denoiser; they add up to `table.num_steps`.

    A call after which the scheduler goes on from an earlier sample than the one that the denoiser was handed belongs to
    the step that began there: Heun, KDPM2 and Runge-Kutta steps do. Multistep schedulers look back too, but have as many
    calls as steps.

    Raises:
        ScheduleError: the calls do not fall into as many steps as the scheduler was asked for.
    """
    if table.num_steps == table.num_inference_steps:
        return (1,) * table.num_steps
    starts: list[int] = []
    for call, row in enumerate(table.rows):
        origin = min((sample for sample, _ in row.samples), default=call)
        starts = [start for start in starts if start <= origin] + ([call] if origin == call else [])
    if len(starts) != table.num_inference_steps:
        raise ScheduleError(
            f"{table.scheduler} calls the denoiser {table.num_steps} times for {table.num_inference_steps} steps, and which "
            "call is of which step is not known; a step policy counts steps: use a schedule instead"
        )
    ends = [*starts[1:], table.num_steps]
    return tuple(end - start for start, end in zip(starts, ends, strict=True))


def require_computed(schedule: Sequence[str]) -> None:
    """Refuses a schedule with reused steps, which no policy has.

    Raises:
        ScheduleError: naming their step indices.
    """
    reused = reused_steps(schedule)
    if reused:
        raise ScheduleError(
            f"the schedule reuses model outputs at step index {', '.join(map(str, reused))}, which a {PLACE[-1]} cannot carry: its "
            "readers compute every step; export a schedule without reused steps"
        )


def exact_policy(schedule: Sequence[str], reference: str, calls: Sequence[int]) -> tuple[StepPolicy, str] | None:
    """The policy that is this schedule, and its native precision; None where there is none.

    There is none for several low precisions, for 16-bit steps in the middle, for a step of two precisions, for a
    schedule without any low precision (nothing is native then), and for a single step at 16 bit.

    Args:
        schedule: one precision per call of the denoiser.
        reference: the 16-bit one.
        calls: from `calls_of_steps`.
    """
    firsts = [sum(calls[:step]) for step in range(len(calls))]
    low = [step for step, call in enumerate(firsts) if schedule[call] != reference]
    if not low:
        return None
    native = schedule[firsts[low[0]]]
    policy = StepPolicy(low[0], len(calls) - 1 - low[-1])
    matches = policy.precisions(calls, reference, native) == tuple(schedule)
    return (policy, native) if matches else None


def nearest_policy(prediction: StoredPrediction, schedule: Sequence[str], calls: Sequence[int]) -> Nearest | None:
    """The policy of least predicted error among those no slower than a schedule; of equal ones the fastest.

    Args:
        prediction: of the calibration whose scores and latencies are used.
        schedule: one precision per call of the denoiser.
        calls: from `calls_of_steps`.

    Returns:
        None where no precision of `FORMATS` has scores, or the schedule is faster than any policy.
    """
    reference, num_steps = prediction.precisions[0], len(calls)
    limit = prediction.latency(schedule) * (1 + LATENCY_TOLERANCE)
    options = []
    for native in (name for name in prediction.precisions[1:] if name in FORMATS.values()):
        for first in range(num_steps):
            for last in range(num_steps - first):
                policy = StepPolicy(first, last)
                precisions = policy.precisions(calls, reference, native)
                latency, error = prediction.latency(precisions), prediction.error(precisions)
                if latency <= limit:
                    options.append(Nearest(policy, native, error, latency))
    return min(options, key=lambda option: (option.predicted_error, option.predicted_latency), default=None)


def _parse(document: Any, path: Path) -> StepPolicy:
    name = PLACE[-1]
    if not isinstance(document, Mapping):
        raise ScheduleError(f"{name} of {path} is {document!r}, expected an object")
    for verb, fields in (("lacks", _FIELDS - set(document)), ("has unknown", set(document) - _FIELDS)):
        if fields:
            raise ScheduleError(f"{name} of {path} {verb} {', '.join(sorted(fields))}; schema version 1 is understood")
    for field, expected in _FIXED.items():
        value = document[field]
        if value != expected or type(value) is not type(expected):
            raise ScheduleError(f"{name} of {path}: {field} is {value!r}, expected {expected!r}")
    if document["reasoner"] not in ("native", "a16"):
        raise ScheduleError(f"{name} of {path}: reasoner is {document['reasoner']!r}, expected 'native' or 'a16'")
    scope = document["scope"]
    if not isinstance(scope, list) or COMPONENT not in scope:
        raise ScheduleError(
            f"{name} of {path}: scope is {scope!r}, expected a list with {COMPONENT!r}: no denoiser in it"
        )
    return StepPolicy(_count(document, "first_steps", path), _count(document, "last_steps", path))


def _count(document: Mapping[str, Any], field: str, path: Path) -> int:
    value = document[field]
    if isinstance(value, Mapping) and set(value) == {"count", "mode"} and value["mode"] == "a16":
        count = value["count"]
        if type(count) is int and count >= 0:
            return count
    raise ScheduleError(
        f"{PLACE[-1]} of {path}: {field} is {value!r}, expected {{'count': a whole number from 0, 'mode': 'a16'}}"
    )
