"""Fingerprints of arrays, computed where the arrays are."""

from typing import Any

import jax
import jax.numpy as jnp


def _mix(h: jax.Array) -> jax.Array:
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return h ^ (h >> 16)


def _words(x: jax.Array) -> jax.Array:
  """The bits of x as unsigned integers as wide as its elements; 64 bits are two words."""
  if jnp.iscomplexobj(x):
    x = jnp.stack([x.real, x.imag], axis=-1)
  whole = jnp.issubdtype(x.dtype, jnp.integer) or jnp.issubdtype(x.dtype, jnp.bool_)
  if whole and x.dtype.itemsize == 1:
    return x.astype(jnp.uint8)  # by value: 4-bit integers have no bitcast to a byte
  return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}"))


@jax.jit
def checksum(x: jax.Array) -> jax.Array:
  """A 32-bit checksum of an array's bits: sum over i of mix(word_i xor mix(i + 1)), modulo 2^32.

  For a fixed i the summand is a bijection of word_i, so a change inside a single word always shows;
  of other changes a fraction of about 2^-32 stays unseen. The sum does not depend on how the array
  is sharded.

  Shapes: [...] of any dtype but typed keys -> [] uint32. Reference: mix is MurmurHash3's `fmix32`
  (Appleby, 2011), a bijection of 32-bit words.
  """
  words = _words(x)
  index = jnp.zeros(words.shape, jnp.uint32)
  for axis, size in enumerate(words.shape):
    index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
  return jnp.sum(_mix(words.astype(jnp.uint32) ^ _mix(index + jnp.uint32(1))), dtype=jnp.uint32)


@jax.jit
def digest(tree: Any) -> jax.Array:
  """The checksum of the checksums of a tree's arrays, in the order of its leaves; [] uint32."""
  return checksum(jnp.stack([checksum(leaf) for leaf in jax.tree.leaves(tree)]))
