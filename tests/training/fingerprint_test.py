"""The checksum against a scalar implementation, and what it has to notice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.training import fingerprint


def fmix32(h):  # MurmurHash3's finaliser on Python integers
  h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
  h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
  return h ^ (h >> 16)


DTYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "int16", "int8", "uint8", "bool",
          "float8_e4m3fn", "int4", "complex64"]  # fmt: skip


def sample(dtype):
  x = np.random.default_rng(0).normal(size=(3, 5)) * 50
  x = jnp.asarray(x > 0 if dtype == "bool" else np.clip(x, -7, 7) if dtype == "int4" else x)
  return x.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksum_equals_a_loop_over_the_bytes(dtype):
  x = sample(dtype)
  raw = np.asarray(x.astype(jnp.int8) if dtype == "int4" else x).tobytes()
  width = min(x.dtype.itemsize, 4)
  words = [int.from_bytes(raw[i : i + width], "little") for i in range(0, len(raw), width)]
  expected = sum(fmix32(w ^ fmix32(i + 1)) for i, w in enumerate(words)) % 2**32
  assert int(fingerprint.checksum(x)) == expected


def test_fmix32_published_value():
  assert fmix32(1) == 0x514E28B7  # MurmurHash3_x86_32 of an empty key with seed 1


def test_every_single_bit_and_every_swap_shows():
  x = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
  changed = []
  for i in range(12):
    for bit in range(32):
      y = x.view(np.uint32).copy()
      y.flat[i] ^= np.uint32(1) << np.uint32(bit)
      changed.append(y.view(np.float32))
  for i, j in zip(*np.triu_indices(12, 1), strict=True):
    y = x.copy()
    y.flat[i], y.flat[j] = x.flat[j], x.flat[i]
    changed.append(y)
  sums = np.asarray(jax.vmap(fingerprint.checksum)(jnp.asarray(np.stack(changed))))
  assert not (sums == int(fingerprint.checksum(jnp.asarray(x)))).any()


def test_zeros_tell_their_number_and_nan_its_bits():
  assert len({int(fingerprint.checksum(jnp.zeros(n))) for n in range(1, 9)}) == 8
  assert int(fingerprint.checksum(jnp.zeros(3))) != int(fingerprint.checksum(-jnp.zeros(3)))
  nan = lambda bits: jax.lax.bitcast_convert_type(jnp.uint32(bits), jnp.float32)
  assert int(fingerprint.checksum(nan(0x7FC00000))) != int(fingerprint.checksum(nan(0x7FC00001)))


def test_a_digest_knows_every_array_and_its_place():
  tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(4, jnp.int32)}
  digest = int(fingerprint.digest(tree))
  assert digest == int(fingerprint.digest(jax.tree.map(jnp.copy, tree)))
  changed = {**tree, "a": tree["a"].at[1, 2].add(1e-6)}
  exchanged = {"a": tree["b"], "b": tree["a"]}
  assert len({digest, *(int(fingerprint.digest(other)) for other in (changed, exchanged))}) == 3
