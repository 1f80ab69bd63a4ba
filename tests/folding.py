"""Parameters and images for models whose batch normalisation is folded, and the comparison of their results."""

import jax
import numpy as np
from jax import numpy as jnp


def randomize(tree):
    """Every array of the tree random: kernels with variance 1 / fan-in, variances positive, the rest normal."""
    rng = np.random.default_rng(0)

    def values(path, leaf):
        if len(leaf.shape) > 1:
            value = rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape)
        elif "'var'" in jax.tree_util.keystr(path):
            value = rng.uniform(0.3, 3, leaf.shape)
        else:
            value = rng.normal(0.5, 1, leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(values, tree)


def image(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape or (2, 9, 9, 4)), jnp.float32)


def assert_equal(result, expected, tolerance=1e-5):
    assert result.dtype == expected.dtype
    result, expected = (np.asarray(array, np.float32) for array in (result, expected))
    np.testing.assert_allclose(result, expected, atol=tolerance * np.abs(expected).max())
