"""Masked sequences that a model fills in, read as responses to problems."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..sampling import base as sampling
from ..sampling import sharded
from ..tasks import tokenizer as tokenizers
from . import attempts


class Query(NamedTuple):
  """A sequence to be filled in."""

  tokens: np.ndarray  # [L] int32, the mask where something is to be written
  start: int  # where the response begins


class Filled(NamedTuple):
  """Sequences without masks."""

  tokens: jax.Array  # [B, L] int32
  calls: jax.Array  # [B] int32, of the network


# (keys [B], tokens [B, L]) -> Filled, jitted, with its parameters bound; B and L never change
Fill = Callable[[sampling.Keys, jax.Array], Filled]


def fill_all(
  fill: Fill,
  queries: Sequence[Query],
  key: jax.Array,
  *,
  num_samples: int,
  batch_size: int,
) -> Filled:
  """`num_samples` fillings of each query, [N num_samples, L], drawn in batches of one shape.

  Sample j of query i is request i * num_samples + j of the run `key`, so it does not depend on the
  batch size, nor on the other queries.
  """
  masked = np.stack([query.tokens for query in queries])
  requests = np.arange(len(queries) * num_samples)
  drawn = []
  for first in range(0, len(requests), batch_size):
    # The last batch is filled up with its own last request.
    batch = np.minimum(np.arange(first, first + batch_size), requests[-1])
    keys = sampling.row_keys(key, jnp.asarray(batch))
    drawn.append(fill(keys, jnp.asarray(masked[batch // num_samples])))
  parts = [sharded.to_host(filled) for filled in drawn]
  return Filled(*(np.concatenate(leaves)[: len(requests)] for leaves in zip(*parts, strict=True)))


def respond(
  fill: Fill,
  tokenizer: tokenizers.Tokenizer,
  queries: Sequence[Query],
  key: jax.Array,
  *,
  num_samples: int,
  batch_size: int,
) -> list[list[attempts.Response]]:
  """As `attempts.respond`: what stands from the start to the first end token is the response.

  Responses have no log-probability: the order in which they were written is one of many.
  """
  filled = fill_all(fill, queries, key, num_samples=num_samples, batch_size=batch_size)
  read = lambda i, row: response(tokenizer, row, queries[i].start)
  rows = np.split(filled.tokens, len(queries))
  return [[read(i, row) for row in group] for i, group in enumerate(rows)]


def response(tokenizer: tokenizers.Tokenizer, filled: np.ndarray, start: int) -> attempts.Response:
  """What was written from `start` on, up to its end, of tokens [L] without masks."""
  tail = filled[start:].tolist()
  ends = [at for at, token in enumerate(tail) if token in tokenizer.stops]
  return attempts.response(tokenizer, tail[: ends[0] + 1] if ends else tail, float("nan"))
