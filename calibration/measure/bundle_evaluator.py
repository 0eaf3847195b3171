"""A bundle as an evaluator: its denoising loop over fixed prompts and starting noise."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np

from calibration.measure.evaluator import SampleSet, SampleSets
from calibration.measure.influence import output_influence
from engines.documents import canonical_json
from engines.files import sha256_bytes
from engines.reuse import MOST_COMPUTED
from engines.runtime import DenoiseRuntime
from engines.sampler import SamplerTable
from engines.sampler_state import SamplerState, row_of, stacked
from engines.text import PromptFile

# Validation noise is drawn from seeds far from those of calibration, so that no sample is shared.
VALIDATION_SEED_OFFSET = 1_000_000
NUDGE = 2.0**-16
NUDGE_SEED = 0x6E756467
"""Beside a sample's seed: noise that nudges a run is not the noise that starts one."""


@dataclass(frozen=True, eq=False)
class Row:
    """The state of one sample: a row of a state that it shares with the samples it was computed with.

    Samples go from step to step together. Their states are taken apart only where others go on with some of them.
    """

    together: SamplerState
    index: int


def _joined(rows: Sequence[Row]) -> SamplerState:
    """The state of all rows in the order given; the shared one where they are all of its rows.

    Raises:
        ValueError: they stand at different steps.
    """
    together = rows[0].together
    whole = len(rows) == len(together.latents)
    if whole and all(row.together is together and row.index == index for index, row in enumerate(rows)):
        return together
    return stacked([row_of(row.together, row.index) for row in rows])


class BundleEvaluator:
    """`calibration.measure.evaluator.Evaluator` over a loaded bundle; sample i is prompt i with seed + i."""

    def __init__(
        self, runtime: DenoiseRuntime, prompts: Sequence[str], seed: int, guidance_scale: float, *, reuse: bool = False
    ) -> None:
        """Encodes the prompts.

        Args:
            runtime: the loaded bundle.
            prompts: one sample each.
            seed: seed of the first sample's starting noise.
            guidance_scale: classifier-free guidance scale.
            reuse: whether steps may reuse computed outputs, which states then keep: about twice the memory.

        Raises:
            PromptError: a prompt cannot be encoded.
        """
        self.num_steps = runtime.num_steps
        self.precisions = runtime.precisions
        self.num_samples = len(prompts)
        self._runtime = runtime
        self._guidance_scale = guidance_scale
        self._conditioning = runtime.encode(prompts)
        self._batches: dict[tuple[int, ...], dict[str, np.ndarray]] = {}
        self._shorter: dict[str, BundleEvaluator] = {}
        self._seed = seed
        self._keep = MOST_COMPUTED if reuse else 0
        self._noise = runtime.noise([seed + index for index in range(len(prompts))])
        self._key = sha256_bytes(
            canonical_json(
                [runtime.manifest.bundle_id, runtime.setting.name, list(prompts), seed, float(guidance_scale)]
            )
        )

    def start(self, sample: int, nudged: bool = False) -> Row:
        """The state before step 0.

        Nudged, unit normal noise of the sample's own (seeded, always the same) is added to the latents, times `NUDGE` of their
        root mean square: far too little to be seen, and the least that lets 16-bit arithmetic, whose numbers have 8 to 11
        bits, round otherwise somewhere.
        """
        noise = self._noise[sample : sample + 1]
        if nudged:
            added = np.random.default_rng([NUDGE_SEED, self._seed + sample]).standard_normal(noise.shape)
            noise = noise + NUDGE * np.sqrt(np.mean(noise.astype(np.float64) ** 2)) * added
        return Row(self._runtime.table.initial(noise), 0)

    def steps(self, samples: Sequence[int], states: Sequence[Row], choice: str) -> list[Row]:
        """One engine call, or none where the step reuses computed outputs, and one sampler update.

        Equal to steps of each sample by itself but for what the engine's rounding owes to the size of its batch.

        Raises:
            ValueError: the states stand at different steps, or computed outputs at different ones before.
            ScheduleError: fewer steps were computed before than the reuse needs, or none may be reused.
        """
        batch = self._batch(tuple(samples))
        after = self._runtime.step(_joined(states), choice, batch, self._guidance_scale, self._keep)
        return [Row(after, index) for index in range(len(states))]

    def _batch(self, samples: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Denoiser inputs other than latents and timestep, kept for the samples of the last call."""
        if samples not in self._batches:
            self._batches = {samples: self._conditioning.select(samples).batch(self._guidance_scale)}
        return self._batches[samples]

    def latents(self, state: Row) -> np.ndarray:
        """float32 [C, h, w], read-only."""
        latents: np.ndarray = state.together.latents[state.index]
        return latents

    def timesteps(self) -> list[float]:
        """Those of the sampler table."""
        found: list[float] = self._runtime.table.timesteps.tolist()
        return found

    def influence(self, choices: Sequence[str]) -> np.ndarray:
        """See `calibration.measure.influence.output_influence`.

        Raises:
            ScheduleError: a reused step has too few computed outputs before it.
        """
        return output_influence(self._runtime.table, choices)

    def shorter(self, loop: str) -> BundleEvaluator:
        """The same samples and engines with another sampler table, given as its JSON.

        Raises:
            SamplerError: it is none.
        """
        if loop not in self._shorter:
            found = copy(self)
            found._runtime = copy(self._runtime)
            found._runtime.table = SamplerTable.from_json(loop)
            found.num_steps = found._runtime.table.num_steps
            self._shorter = {loop: found}
        return self._shorter[loop]

    def key(self) -> str:
        """Digest of the bundle, its setting, the prompts, the seed and the guidance scale."""
        return self._key


@dataclass(frozen=True)
class BundleSamples:
    """Which samples a bundle is measured on; data that can travel to a worker process.

    Attributes:
        prompts: of calibration and validation, one sample each.
        seed: of the first calibration sample's starting noise; validation samples have seeds far from it.
        guidance_scale: of every run.
        reuse: whether steps may reuse computed outputs.
    """

    prompts: PromptFile
    seed: int
    guidance_scale: float
    reuse: bool = False

    def open(self, runtime: DenoiseRuntime) -> SampleSets:
        """The samples of a loaded bundle; pictures of validation samples are compared.

        Raises:
            PromptError: a prompt cannot be encoded.
        """
        apart = self.seed + VALIDATION_SEED_OFFSET

        def opened(prompts: Sequence[str], seed: int) -> SampleSet:
            evaluator = BundleEvaluator(runtime, prompts, seed, self.guidance_scale, reuse=self.reuse)
            return SampleSet(evaluator, runtime.decode)

        return SampleSets(opened(self.prompts.calibration, self.seed), opened(self.prompts.validation, apart))


def samples_per_call(runtime: DenoiseRuntime, guidance_scale: float) -> int:
    """How many samples one call of the denoisers is compiled for; 1 where fewer rows take less time."""
    package = runtime.manifest.reference.package
    if package is None:
        return 1
    guided = guidance_scale > 1.0 and not runtime.manifest.embeds_guidance
    return max(1, package.batch // (2 if guided else 1))
