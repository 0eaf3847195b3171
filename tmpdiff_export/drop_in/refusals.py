"""What an attached pipeline cannot do, because it happens inside the denoiser that engines stand in for."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

from engines.errors import TmpDiffError

# Methods of pipelines that load files or change other components before they reach the denoiser, or that pass over a
# component that is no diffusers model. Others ask the denoiser, and `BundleDenoiser` refuses them.
REFUSED_METHODS = (
    "load_lora_weights", "unload_lora_weights", "fuse_lora", "unfuse_lora", "set_adapters", "delete_adapters",
    "enable_lora", "disable_lora", "set_lora_device", "enable_lora_hotswap",
    "load_ip_adapter", "unload_ip_adapter", "set_ip_adapter_scale",
)  # fmt: skip


class AttachedError(TmpDiffError):
    """An attached pipeline was asked for something that only its own denoiser can do.

    No AttributeError: `hasattr` would take it for absence, and diffusers passes over what a component lacks.
    """


def refuse(asked: str, component: str) -> NoReturn:
    """Raises the error that names what was asked for.

    Args:
        asked: the operation, and of what.
        component: attribute of the pipeline that holds the stand-in.

    Raises:
        AttachedError: always.
    """
    raise AttachedError(
        f"{asked} needs the pipeline's own {component}, and a bundle's engines stand in its place; call "
        "tmpdiff_export.detach(pipe) first"
    )


def refuse_methods(pipe: Any, component: str) -> None:
    """Makes those of `REFUSED_METHODS` that a pipeline has refuse every call, before anything is loaded."""
    for name in REFUSED_METHODS:
        if hasattr(type(pipe), name):
            pipe.__dict__[name] = partial(_refuse_call, f"{type(pipe).__name__}.{name}", component)


def restore_methods(pipe: Any) -> None:
    """Undoes `refuse_methods`."""
    for name in REFUSED_METHODS:
        pipe.__dict__.pop(name, None)


def _refuse_call(asked: str, component: str, *args: Any, **kwargs: Any) -> NoReturn:
    refuse(asked, component)
