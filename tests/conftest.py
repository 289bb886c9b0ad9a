"""Makes JAX strict: no implicit rank promotion, no reused key; takes the CPU; compiles quickly."""

import os

import jax
import jaxlib
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

# Tests compile much and compute little. A flag that a version does not know ends the process.
jax.config.update("jax_disable_most_optimizations", True)
if jaxlib.__version__.startswith("0.10."):
  _FLAG = "--xla_cpu_use_fusion_emitters=false"  # halves what is left
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}"


@pytest.fixture
def optimised():
  """The programs that users run."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)
