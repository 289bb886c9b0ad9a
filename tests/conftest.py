"""Makes JAX strict: no implicit rank promotion, no reused key; and takes the CPU."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
