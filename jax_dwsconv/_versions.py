"""Which versions of JAX this package runs with."""

import importlib.metadata

PACKAGE = importlib.metadata.version("jax-dwsconv")
OLDEST_JAX = (0, 10)
NEWEST_JAX = (0, 12)


def is_supported(jax_version: str) -> bool:
    """Whether a JAX version such as "0.10.2" is one this package was made for."""
    major, minor = (int(part) for part in jax_version.split(".")[:2])
    return OLDEST_JAX <= (major, minor) <= NEWEST_JAX


def check() -> None:
    """Raises ImportError, naming the versions that work, where jax or jaxlib is not one of them."""
    for name in ("jax", "jaxlib"):
        found = importlib.metadata.version(name)
        if not is_supported(found):
            oldest, newest = (".".join(map(str, v)) for v in (OLDEST_JAX, NEWEST_JAX))
            after = f"{NEWEST_JAX[0]}.{NEWEST_JAX[1] + 1}"
            raise ImportError(
                f"jax-dwsconv {PACKAGE} works with {name} {oldest} to {newest}, but {name} {found} is installed. "
                f"Install one of those versions ('pip install \"jax>={oldest},<{after}\"') or another version of "
                "jax-dwsconv."
            )
