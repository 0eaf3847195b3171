"""The engines of a bundle as they are loaded: which of them a setting runs, on the hosts of their backends."""

from __future__ import annotations

from collections.abc import Sequence

from engines.backends.choose import HostOptions, open_host
from engines.bundle import Bundle
from engines.engine import Engine
from engines.errors import BackendError, BundleError
from engines.host import EngineHost
from engines.manifest import EngineEntry, Engines, engine_for
from engines.reuse import engines_of
from engines.setting_entry import SettingEntry

TEXT_ENCODER, VAE_DECODER = "text encoder", "VAE decoder"


class LoadedEngines:
    """Engines of one bundle, loaded at their first use and kept until `close`. Not thread-safe."""

    def __init__(self, bundle: Bundle, options: HostOptions) -> None:
        """Loads nothing.

        Raises:
            BackendError: a limit on resident engines is given for a backend that has no such limit.
        """
        reference = bundle.manifest.reference
        if options.resident_engines is not None and (reference.backend == "tensorrt-rtx" or reference.device == "cpu"):
            raise BackendError(
                "a limit on resident engines is for bundles of the tensorrt, torch and onnxruntime backends on a GPU; this "
                f"one's engines run on {reference.backend} ({reference.device})"
            )
        self._bundle, self._options = bundle, options
        self._hosts: dict[str, EngineHost] = {}
        self._added: set[str] = set()

    @property
    def resident_engines(self) -> int | None:
        """The limit on denoiser engines in device memory, None for none."""
        return self._options.resident_engines

    def close(self) -> None:
        """Frees every engine."""
        self._added.clear()
        while self._hosts:
            self._hosts.popitem()[1].close()

    def denoiser(self, precision: str, setting: SettingEntry) -> Engine:
        """The denoiser engine of a precision for a setting.

        Raises:
            BackendError: the bundle holds no such precision, or its backend is not available.
            BundleError: its file is damaged, or no engine is for the setting.
        """
        host, (name,) = self.denoisers((precision,), setting)
        return host.engine(name)

    def denoisers(self, choices: Sequence[str], setting: SettingEntry) -> tuple[EngineHost, tuple[str, ...]]:
        """The host of the denoisers, and the name there of each precision's engine for a setting; reuses as they are.

        Raises:
            BackendError, BundleError: as `denoiser`.
        """
        held = self._bundle.manifest.denoisers
        found: dict[str, tuple[str, EngineHost]] = {}
        for precision in engines_of(choices):
            if precision not in held:
                raise BackendError(f"no engine of precision {precision!r}; the bundle holds {', '.join(held)}")
            found[precision] = self._host_of(precision, held[precision], setting)
        names = tuple(found[choice][0] if choice in found else choice for choice in choices)
        return next(iter(found.values()))[1], names

    def component(self, name: str, setting: SettingEntry) -> Engine:
        """The text encoder or the VAE decoder for a setting.

        Args:
            name: `TEXT_ENCODER` or `VAE_DECODER`.
            setting: of the bundle.

        Raises:
            BackendError, BundleError: as `denoiser`.
        """
        manifest = self._bundle.manifest
        entries = manifest.text_encoder if name == TEXT_ENCODER else manifest.vae_decoder
        named, host = self._host_of(name, entries, setting)
        return host.engine(named)

    def _host_of(self, name: str, entries: Engines, setting: SettingEntry) -> tuple[str, EngineHost]:
        """The name and the host of the engine for a setting, with its files checked and added to the host."""
        entry = engine_for(entries, setting)
        if entry is None:
            raise BundleError(
                f"no engine of {name} runs setting {setting.name} ({setting.described}); there are engines for "
                f"{'; '.join(entry.shapes(self._bundle.manifest.model.pixels_per_latent) for entry in entries)}; build the bundle with that --size and --text-length"
            )
        position = entries.index(entry)
        named = f"{name} #{position + 1}" if position else name
        return named, self._add(named, entry)

    def _add(self, name: str, entry: EngineEntry) -> EngineHost:
        if name not in self._added:
            paths = self._bundle.paths_of(entry.files())
            if entry.backend not in self._hosts:
                self._hosts[entry.backend] = open_host(entry.backend, entry.device, self._options)
            self._hosts[entry.backend].add(name, entry, paths[0])
            self._added.add(name)
        return self._hosts[entry.backend]
