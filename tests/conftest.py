"""Every test runs on whatever backend JAX finds: the CPU, or an NVIDIA GPU."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # for the tests of sharding; the others run on the first one


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")  # before the fixtures of modules
def _full_precision():
    """Without this, lax itself computes in TF32 on a GPU, and there is nothing to compare with."""
    with jax.default_matmul_precision("highest"):
        yield
