"""Likelihood: closed forms of values and gradients, chunks, masks, packing, memory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import targets
from ancestral.models import toy
from ancestral.training import likelihood

B, L, D, V = 3, 10, 6, 7
RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(B, L, D)), jnp.float32)
KERNEL = jnp.asarray(RNG.normal(size=(D, V)), jnp.float32)
TARGETS = jnp.asarray(RNG.integers(0, V, (B, L)), jnp.int32)
MASK = jnp.asarray(RNG.uniform(size=(B, L)) < 0.6, jnp.float32).at[1].set(0)  # row 1 has no target
LOGITS = jnp.asarray(3 * RNG.normal(size=(5, V)), jnp.float32)
CHOSEN = jnp.asarray(RNG.integers(0, V, 5), jnp.int32)


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


def test_cross_entropy_of_logits_worked_by_hand():
  # p = (1/6, 2/6, 3/6) and Z = 6
  logits = jnp.log(jnp.array([[1.0, 2.0, 3.0]] * 3))
  losses = likelihood.cross_entropy(logits, jnp.arange(3))
  np.testing.assert_allclose(losses, np.log([6, 3, 2]), rtol=1e-6)
  losses = likelihood.cross_entropy(logits, jnp.arange(3), z_loss=0.5)
  np.testing.assert_allclose(losses, np.log([6, 3, 2]) + 0.5 * np.log(6) ** 2, rtol=1e-6)


def test_cross_entropy_equals_optax():
  expected = optax.softmax_cross_entropy_with_integer_labels(LOGITS, CHOSEN)
  np.testing.assert_allclose(likelihood.cross_entropy(LOGITS, CHOSEN), expected, rtol=1e-5)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_gradient_of_cross_entropy_is_its_closed_form(z_loss):
  gradient = jax.grad(lambda logits: likelihood.cross_entropy(logits, CHOSEN, z_loss=z_loss).sum())(
    LOGITS
  )
  probability, exact = targets.softmax(LOGITS), np.asarray(LOGITS, np.float64)
  log_normaliser = np.log(np.exp(exact).sum(axis=-1, keepdims=True))
  expected = probability - np.eye(V)[CHOSEN] + 2 * z_loss * log_normaliser * probability
  np.testing.assert_allclose(gradient, expected, atol=2e-6)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_cross_entropy_of_large_and_of_narrow_logits(z_loss):
  large = likelihood.cross_entropy(LOGITS + 300.0, CHOSEN, z_loss=z_loss)
  assert np.all(np.isfinite(large))
  narrow = LOGITS.astype(jnp.bfloat16)
  wide = likelihood.cross_entropy(narrow.astype(jnp.float32), CHOSEN, z_loss=z_loss)
  np.testing.assert_array_equal(likelihood.cross_entropy(narrow, CHOSEN, z_loss=z_loss), wide)


def chunked(kernel, hidden, mask=MASK, *, chunk, z_loss=0.01):
  return likelihood.chunked_cross_entropy(
    lambda hidden: jnp.matmul(hidden, kernel), hidden, TARGETS, mask, chunk=chunk, z_loss=z_loss
  )


def whole(kernel, hidden, mask=MASK):
  """By numpy in float64, with all logits at once."""
  logits = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
  log_normaliser = np.log(np.exp(logits).sum(axis=-1))
  chosen = np.take_along_axis(logits, np.asarray(TARGETS)[..., None], -1)[..., 0]
  losses = log_normaliser - chosen + 0.01 * log_normaliser**2
  right = logits.argmax(axis=-1) == TARGETS
  return (losses * mask).sum(axis=-1), (right * mask).sum(axis=-1)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 9, 10, 256])
def test_chunks_equal_the_whole_in_value(chunk):
  losses, right = chunked(KERNEL, HIDDEN, chunk=chunk)
  expected, expected_right = whole(KERNEL, HIDDEN)
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  np.testing.assert_array_equal(right, expected_right)
  assert 0 < right.sum() < MASK.sum()


def gradient_by_hand():
  """Of the sum over rows: (softmax - onehot + 2 z log Z softmax) of each target, pulled back."""
  logits = np.asarray(HIDDEN, np.float64) @ np.asarray(KERNEL, np.float64)
  log_normaliser = np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  by_logits = (1 + 0.02 * log_normaliser) * targets.softmax(logits) - np.eye(V)[TARGETS]
  by_logits *= np.asarray(MASK)[..., None]
  return np.einsum("bld,blv->dv", HIDDEN, by_logits), by_logits @ np.asarray(KERNEL).T


@pytest.mark.parametrize("chunk", [1, 4, 5, 10])
def test_chunks_equal_the_whole_in_gradient(chunk):
  total = lambda kernel, hidden: chunked(kernel, hidden, chunk=chunk)[0].sum()
  gradients = jax.grad(total, argnums=(0, 1))(KERNEL, HIDDEN)
  for gradient, expected in zip(gradients, gradient_by_hand(), strict=True):
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("chunk", [4, 10])
def test_the_mask_weighs_targets(chunk):
  weights = jnp.asarray(np.random.default_rng(1).uniform(size=(B, L)), jnp.float32)
  for found, expected in zip(
    chunked(KERNEL, HIDDEN, weights, chunk=chunk), whole(KERNEL, HIDDEN, weights), strict=True
  ):
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("chunk", [4, 10])
def test_rows_without_targets_are_zero_and_so_are_their_gradients(chunk):
  losses, right = chunked(KERNEL, HIDDEN, chunk=chunk)
  assert losses[1] == 0 and right[1] == 0
  gradient = jax.grad(lambda hidden: chunked(KERNEL, hidden, chunk=chunk)[0].sum())(HIDDEN)
  np.testing.assert_array_equal(np.any(np.asarray(gradient) != 0, axis=-1), MASK > 0)


def test_a_masked_target_may_be_impossible():
  logits = jnp.array([[[0.0, -jnp.inf], [0.0, 0.0]]])

  def loss(logits):
    return likelihood.chunked_cross_entropy(
      lambda x: x, logits, jnp.array([[1, 0]]), jnp.array([[0.0, 1.0]]), chunk=1
    )[0][0]

  value, gradient = jax.value_and_grad(loss)(logits)
  assert value == pytest.approx(np.log(2))
  np.testing.assert_allclose(gradient, [[[0, 0], [-0.5, 0.5]]], atol=1e-6)


def array_sizes(jaxpr):
  """The size of every array that a jaxpr makes, inner ones included."""
  for equation in jaxpr.eqns:
    yield from (variable.aval.size for variable in equation.outvars)
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from array_sizes(inner)


def largest(function, *args):
  return max(array_sizes(jax.make_jaxpr(function)(*args).jaxpr))


@pytest.mark.parametrize("chunk", [16, 24, 64])
def test_logits_are_made_a_chunk_at_a_time(chunk):
  batch_size, length, width, vocab_size = 2, 64, 8, 1001
  hidden = jnp.zeros((batch_size, length, width))
  kernel = jnp.zeros((width, vocab_size))
  tokens = jnp.zeros((batch_size, length), jnp.int32)

  def loss(kernel, hidden):
    return likelihood.chunked_cross_entropy(
      lambda x: jnp.matmul(x, kernel), hidden, tokens, jnp.ones(tokens.shape), chunk=chunk
    )[0].sum()

  forward_and_backward = jax.value_and_grad(loss, argnums=(0, 1))
  for function in (loss, forward_and_backward):
    assert largest(function, kernel, hidden) == batch_size * chunk * vocab_size
  compiled = jax.jit(forward_and_backward).lower(kernel, hidden).compile()
  logits_bytes = 4 * batch_size * length * vocab_size
  assert (compiled.memory_analysis().temp_size_in_bytes < logits_bytes) == (chunk < length)


def test_next_token_never_makes_all_logits():
  model, params = targets.tiny_target(vocab_size=400)
  batch = {
    "tokens": jnp.zeros((2, 32), jnp.int32),
    "targets": jnp.zeros((2, 32), jnp.int32),
    "mask": jnp.ones((2, 32), bool),
  }

  def total(loss_fn):
    return jax.grad(lambda params: loss_fn(jax.random.key(0), params, batch)[0][0].sum())

  assert largest(total(likelihood.next_token(model, chunk=8)), params) < 2 * 32 * 400
  assert largest(total(likelihood.next_token(model)), params) >= 2 * 32 * 400


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_next_token_is_the_negative_log_law(chunk):
  model, params = targets.table_target(vocab_size=3, order=2)
  prompt, num_tokens = (1, 2), 3
  law = toy.table_law(targets.softmax(params), prompt, num_tokens)
  rows = np.array([prompt + drawn for drawn in itertools.product(range(3), repeat=num_tokens)])
  mask = np.broadcast_to([False, True, True, True], (27, 4))  # the first target is of the prompt
  batch = {
    "tokens": jnp.asarray(rows[:, :-1]),
    "targets": jnp.asarray(rows[:, 1:]),
    "mask": jnp.asarray(mask),
  }
  (losses, weights), metrics = likelihood.next_token(model, chunk=chunk)(
    jax.random.key(0), params, batch
  )
  np.testing.assert_allclose(losses, -np.log(law.reshape(-1)), rtol=1e-5)
  np.testing.assert_array_equal(weights, np.full(27, 3.0))
  greedy = [
    sum(targets.softmax(params)[tuple(row[t - 2 : t])].argmax() == row[t] for t in (2, 3, 4))
    for row in rows
  ]
  np.testing.assert_array_equal(metrics["accuracy"], greedy)
  assert set(metrics) == {"accuracy"}


def test_next_token_passes_its_z_loss_on():
  model, params = targets.table_target(vocab_size=3, order=1)
  batch = {
    "tokens": jnp.array([[0, 2]]),
    "targets": jnp.array([[2, 1]]),
    "mask": jnp.array([[True, True]]),
  }
  sums = [
    likelihood.next_token(model, z_loss=z)(jax.random.key(0), params, batch)[0][0][0]
    for z in (0.0, 0.1)
  ]
  log_normalisers = np.log(np.exp(np.asarray(params, np.float64)).sum(axis=-1))
  expected = 0.1 * np.square(log_normalisers[[0, 2]]).sum()
  assert sums[1] - sums[0] == pytest.approx(expected, rel=1e-4)


def document(rng, length):
  tokens = rng.integers(0, 23, length + 1)
  return tokens[:-1], tokens[1:], rng.uniform(size=length) < 0.8


def padded(rows, length=12):
  """Rows of documents, end to end, as data.py packs them; segment 0 is padding."""
  batch = {
    name: np.zeros((len(rows), length), np.int32)
    for name in ("tokens", "targets", "mask", "segments", "positions")
  }
  for b, documents in enumerate(rows):
    start = 0
    for number, (tokens, following, mask) in enumerate(documents):
      here = slice(start, start + len(tokens))
      batch["tokens"][b, here], batch["targets"][b, here] = tokens, following
      batch["mask"][b, here], batch["segments"][b, here] = mask, number + 1
      batch["positions"][b, here] = np.arange(len(tokens))
      start += len(tokens)
  batch["mask"] = batch["mask"].astype(bool)
  return {name: jnp.asarray(array) for name, array in batch.items()}


def test_a_packed_batch_equals_its_documents_apart():
  # Learned positions are absolute: with rotary ones, wrong positions would not show.
  model, params = targets.tiny_target(num_layers=1, positions="learned")
  rng = np.random.default_rng(2)
  rows = [[document(rng, 5), document(rng, 4), document(rng, 2)], [document(rng, 12)], []]
  loss_fn = likelihood.next_token(model, chunk=5)

  @jax.jit
  def gradient(params, batch):
    def sums(params):
      (losses, weights), metrics = loss_fn(jax.random.key(0), params, batch)
      return losses.sum(), (losses, weights, metrics["accuracy"])

    return jax.grad(sums, has_aux=True)(params)

  together, packed = gradient(params, padded(rows))
  assert packed[0][2] == 0 and packed[1][2] == 0  # no document
  # A document before its padding needs no segments: the model is causal.
  alone = padded([[one] for row in rows for one in row])
  apart, single = gradient(params, {name: alone[name] for name in ("tokens", "targets", "mask")})
  for found, of_document in zip(packed, single, strict=True):
    expected = [of_document[:3].sum(), of_document[3], 0]
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max())),
    together,
    apart,
  )


def test_next_token_drops_out_by_its_key():
  model, params = targets.tiny_target(dropout=0.5, num_layers=1)
  batch = padded([[document(np.random.default_rng(3), 12)]])
  loss = jax.jit(lambda key: likelihood.next_token(model)(key, params, batch)[0][0][0])
  first, again, other = (loss(jax.random.key(seed)) for seed in (1, 1, 2))
  assert first == again != other and loss(None) not in (first, other)
