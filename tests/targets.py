"""What tests share: small models with fixed params, prompts and keys, and the noise of a law."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from ancestral.models import base, toy, transformer
from ancestral.sampling import base as sampling
from ancestral.sampling import decode

apply = jax.jit(base.apply, static_argnums=0)  # eager layers are compiled one operation at a time


def table_target(vocab_size: int = 4, order: int = 2, seed: int = 0):
  """A table model and its logits [V] * order + [V], float32."""
  logits = np.random.default_rng(seed).normal(size=(vocab_size,) * (order + 1))
  return toy.table(vocab_size, order), jnp.asarray(logits, jnp.float32)


def markov_target(vocab_size: int = 5, seed: int = 1):
  """A Markov chain and its log transition probabilities [V, V], float32."""
  transition = np.random.default_rng(seed).dirichlet(np.ones(vocab_size), size=vocab_size)
  return toy.markov(vocab_size), jnp.asarray(np.log(transition), jnp.float32)


TINY = {
  "vocab_size": 23,
  "max_length": 32,
  "num_layers": 2,
  "width": 32,
  "num_heads": 4,
  "num_kv_heads": 2,
}


# What two families differ in from Llama, as fields of `tiny_config`.
GEMMA2 = {
  "window": 4,
  "window_pattern": (True, False),
  "attention_softcap": 20.0,
  "logit_softcap": 10.0,
  "activation": "gelu_tanh",
  "zero_centred_norms": True,
  "post_norms": True,
  "embedding_scale": 32**0.5,
}
GPT2 = {
  "norm": "layer",
  "gated_mlp": False,
  "activation": "gelu_tanh",
  "use_bias": True,
  "positions": "learned",
  "num_kv_heads": 4,
}


def tiny_config(**fields) -> transformer.TransformerConfig:
  """Two layers of width 32, with grouped queries."""
  return transformer.TransformerConfig(**{**TINY, **fields})


def fixed_params(model: base.LanguageModel, seed: int = 0):
  """Params that make every part of a transformer matter: no zero bias, no unit scale.

  Freshly initialised weights are so small that a wrong mask hardly moves the logits.
  """
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))

  def fill(path, leaf):
    name = path[-1].key
    noise = rng.normal(size=leaf.shape)
    if name == "scale":
      noise = 1 + 0.2 * noise
    elif name == "bias":
      noise = 0.3 * noise
    elif name in ("kernel", "readout"):
      noise = noise * 1.5 / leaf.shape[-2] ** 0.5
    elif name == "embedding":
      noise = 0.5 * noise
    return jnp.asarray(noise, jnp.float32)

  return jax.tree_util.tree_map_with_path(fill, shapes)


@functools.cache
def tiny_target(seed: int = 0, **fields):
  """A tiny transformer and its fixed params; the same object for the same fields."""
  model = transformer.transformer(tiny_config(**fields))
  return model, fixed_params(model, seed)


def prompts_of(rows: list[list[int]], width: int | None = None) -> decode.Prompts:
  """Prompts, as wide as the longest or as said."""
  width = max(len(row) for row in rows) if width is None else width
  tokens = np.zeros((len(rows), width), np.int32)
  for b, row in enumerate(rows):
    tokens[b, : len(row)] = row
  return decode.Prompts(jnp.asarray(tokens), jnp.array([len(row) for row in rows], jnp.int32))


def keys_of(requests, seed: int = 0) -> jax.Array:
  """The keys of requests [B] in the run of that seed."""
  return sampling.row_keys(jax.random.key(seed), jnp.asarray(requests))


def softmax(logits: np.ndarray) -> np.ndarray:
  """Over the last axis, in float64."""
  logits = np.asarray(logits, np.float64)
  weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return weights / weights.sum(axis=-1, keepdims=True)


def filtered(logits: np.ndarray, keep) -> np.ndarray:
  """The logits with -inf where `keep` (of one row, to a set of tokens) leaves a token out."""
  rows = np.asarray(logits, np.float64).reshape(-1, logits.shape[-1])
  out = np.full_like(rows, -np.inf)
  for row, result in zip(rows, out, strict=True):
    for token in keep(row):
      result[token] = row[token]
  return out.reshape(logits.shape)


def top_k_set(row: np.ndarray, k: int) -> set[int]:
  """The tokens that fewer than k tokens beat."""
  return {i for i, value in enumerate(row) if sum(other > value for other in row) < k}


def descending(scores: np.ndarray) -> list[int]:
  """The tokens by falling score, of equals lowest index first."""
  return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def top_p_set(row: np.ndarray, p: float) -> set[int]:
  """The tokens, likeliest first, until their probability reaches p."""
  probability, kept, mass = softmax(row), set(), 0.0
  for i in descending(row):
    if mass >= p and p < 1:
      break
    kept.add(i)
    mass += probability[i]
  return kept


def entropy(p: np.ndarray) -> float:
  """In nats, of a law [V]."""
  p = np.asarray(p, np.float64)
  return float(-np.sum(p[p > 0] * np.log(p[p > 0])))


def top_h_set(row: np.ndarray, alpha: float) -> set[int]:
  """The longest prefix, likeliest first, whose renormalised law has H <= alpha H(p)."""
  p, order = softmax(row), descending(row)
  share = lambda n: p[order[:n]] / p[order[:n]].sum()
  bound = alpha * entropy(p) * (1 + 1e-7)
  fits = [n for n in range(1, sum(p > 0) + 1) if n == 1 or entropy(share(n)) <= bound]
  return set(order[: max(fits)])


def total_variation(counts: np.ndarray, law: np.ndarray) -> float:
  """Half the L1 distance of the frequencies from the law, arrays of one shape."""
  return 0.5 * float(np.abs(counts / counts.sum() - law).sum())


def noise_floor(law: np.ndarray, num_draws: int) -> float:
  """The total variation that n honest draws stay under: its mean plus four standard errors.

  Mean: 1/2 sum_v E|c_v / n - p_v| <= 1/2 sum_v sqrt(p_v (1 - p_v) / n), by Jensen. Variance: at
  most (1 - sum_v p_v^2) / (2 n) by Efron and Stein, as replacing one draw moves it by 1/n at most.
  """
  law = np.asarray(law, np.float64)
  mean = 0.5 * np.sqrt(law * (1 - law) / num_draws).sum()
  return mean + 4 * np.sqrt((1 - np.square(law).sum()) / (2 * num_draws))


def check_law(samples: np.ndarray, law: np.ndarray) -> None:
  """Asserts that integer samples [N, n] follow the law [V] * n, and none is impossible."""
  np.testing.assert_allclose(law.sum(), 1, rtol=1e-9)
  counts = np.zeros(law.shape)
  np.add.at(counts, tuple(np.asarray(samples).T), 1)
  assert counts[law == 0].sum() == 0, "a token of probability 0 was drawn"
  distance, floor = total_variation(counts, law), noise_floor(law, len(samples))
  assert distance <= floor, f"total variation {distance:.4f}, noise floor {floor:.4f}"


def run_on_eight_devices(path: str, *arguments: str) -> str:
  """Runs the functions `eight_*` of a test file in a process of 8 devices; what pytest prints.

  What takes time is compiling, and what is compared is compiled alike: without optimisations.

  Args:
    path: of the file.
    arguments: for pytest, such as "-k", a name.
  """
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
  }
  command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
  done = subprocess.run(
    [*command, "-o", "python_functions=eight_*", *arguments, os.path.abspath(path)],
    env=environment,
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout
