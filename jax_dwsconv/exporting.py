"""Export of functions that contain this package's operators."""

from jax import export

from jax_dwsconv import _native


def disabled_export_checks() -> list[export.DisabledSafetyCheck]:
    """What to pass as `disabled_checks` to `jax.export.export`.

    JAX exports only custom calls whose stability somebody vouches for. This package does so for its own: an exported
    program runs with the version of this package that exported it and with every later one.

    Returns:
      One entry for every custom-call target of this package.
    """
    return [export.DisabledSafetyCheck.custom_call(target) for target in _native.TARGETS.values()]
