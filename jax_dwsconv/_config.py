"""The environment variables, read when a function is traced and lowered: set them first, JAX keeps what it compiled.

JAX_DWSCONV_DISABLE=1 routes everything to `jax.lax`, int8 to shifted products. JAX_DWSCONV_FALLBACK says what happens
where a depthwise convolution that has no kernel goes to `jax.lax`: "silent" (the default), "warn" or "error".
JAX_DWSCONV_TILE forces a plan of the CUDA kernels, as `python -m jax_dwsconv plan` prints it or for pointwise
convolutions `_planning.plan_pointwise` gives it, wherever it is possible: for experiments.
"""

import os
import warnings


class FallbackWarning(UserWarning):
    """A depthwise convolution took the slower path through `jax.lax`."""


class UnsupportedError(NotImplementedError):
    """A depthwise convolution has no kernel, and JAX_DWSCONV_FALLBACK=error."""


def disabled() -> bool:
    """Whether JAX_DWSCONV_DISABLE is set."""
    return os.environ.get("JAX_DWSCONV_DISABLE", "0") not in ("", "0")


def forced_tile() -> str:
    """JAX_DWSCONV_TILE."""
    return os.environ.get("JAX_DWSCONV_TILE", "")


def fall_back(reason: str) -> None:
    """Reports, as JAX_DWSCONV_FALLBACK asks for, that a convolution goes to `jax.lax`.

    Args:
      reason: what is not supported and what would be.
    """
    mode = os.environ.get("JAX_DWSCONV_FALLBACK", "") or "silent"
    message = f"jax_dwsconv: depthwise convolution falls back to jax.lax: {reason}"
    if mode == "error":
        raise UnsupportedError(message)
    if mode == "warn":
        # Python itself shows the same text from the same place only once.
        warnings.warn(message, FallbackWarning, stacklevel=2)
    elif mode != "silent":
        raise ValueError(f"JAX_DWSCONV_FALLBACK={mode!r} is unknown: use 'silent', 'warn' or 'error'")
