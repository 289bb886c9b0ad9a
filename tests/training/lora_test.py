"""LoRA: its gradients by the chain rule, that nothing else moves, and what the program holds."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import targets
from ancestral.models import transformer
from ancestral.training import likelihood, lora, optimizer, state, step

PATTERNS = ("attention/(query|value)/kernel", "mlp/down")
SCALE = 0.5
STACKED, APART = (targets.tiny_target(scan_layers=scan) for scan in (True, False))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 23, (4, 9)), jnp.int32)
BATCH = {
  "tokens": TOKENS[:, :-1],
  "targets": TOKENS[:, 1:],
  "mask": jnp.ones((4, 8), bool),
}


@pytest.fixture(autouse=True)
def exact():
  with jax.default_matmul_precision("highest"):
    yield


def random_adapters(params, rank=3, patterns=PATTERNS):
  made = lora.init(jax.random.key(1), params, patterns, rank)
  rng = np.random.default_rng(2)
  fill = lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32)
  return {path: lora.Adapter(a, fill(b)) for path, (a, b) in made.items()}


def squares(key, params, batch):
  """A loss that uses every parameter, of a model that is one product after another."""
  del key
  hidden = jnp.tanh(jnp.matmul(batch["x"], params["first"]["kernel"]))
  out = jnp.matmul(hidden, params["second"]["kernel"])
  return (jnp.sum(jnp.square(out - batch["y"]), axis=-1), jnp.ones(len(out))), {}


def small():
  rng = np.random.default_rng(3)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {"first": {"kernel": draw(5, 4)}, "second": {"kernel": draw(4, 3)}}
  adapters = {"first/kernel": lora.Adapter(draw(5, 2), draw(2, 4))}
  return params, adapters, {"x": draw(7, 5), "y": draw(7, 3)}


@pytest.mark.parametrize("target, lead", [(STACKED, (2,)), (APART, ())])
def test_adapters_are_of_the_matrices_asked_for_and_begin_as_no_change(target, lead):
  _, params = target
  made = lora.init(jax.random.key(0), params, PATTERNS, 3)
  layers = ("",) if lead else ("0/", "1/")
  names = ("attention/query/kernel", "attention/value/kernel", "mlp/down/kernel")
  assert set(made) == {f"layers/{i}{name}" for i in layers for name in names}
  first = made[f"layers/{layers[0]}attention/value/kernel"]
  assert first.a.shape == (*lead, 32, 3) and first.b.shape == (*lead, 3, 16)
  assert first.a.dtype == first.b.dtype == jnp.float32
  jax.tree.map(np.testing.assert_array_equal, lora.merge(params, made, 7.0), params)
  from_shapes = lora.init(jax.random.key(0), jax.eval_shape(lambda: params), PATTERNS, 3)
  jax.tree.map(np.testing.assert_array_equal, from_shapes, made)


def test_a_is_uniform_as_peft_draws_it_and_differs_between_layers_and_matrices():
  params = {"one": {"kernel": jnp.zeros((3, 400, 50))}, "two": {"kernel": jnp.zeros((400, 50))}}
  made = lora.init(jax.random.key(0), params, ("kernel",), 16)
  a = np.concatenate([np.ravel(adapter.a) for adapter in made.values()])
  bound = 400**-0.5  # torch's kaiming_uniform_ with a = sqrt(5): sqrt(6 / (6 in))
  assert np.abs(a).max() <= bound and len(np.unique(a)) > 0.99 * len(a)
  # Of a uniform variable on +-1: variance 1/3 and fourth moment 1/5, here of 25,600 draws.
  assert abs(np.mean(a) / bound) < 4 * (1 / 3 / len(a)) ** 0.5
  assert abs(np.mean((a / bound) ** 2) - 1 / 3) < 4 * ((1 / 5 - 1 / 9) / len(a)) ** 0.5


def test_scales():
  assert lora.usual_scale(16, 8) == 2 and lora.rank_stabilised_scale(16, 64) == 2


def test_merged_is_the_sum_by_loops():
  params, adapters, _ = small()
  merged = lora.merge(params, adapters, SCALE)
  a, b = (np.asarray(x, np.float64) for x in adapters["first/kernel"])
  for i in range(5):
    for o in range(4):
      change = sum(a[i, r] * b[r, o] for r in range(2))
      expected = float(params["first"]["kernel"][i, o]) + SCALE * change
      assert merged["first"]["kernel"][i, o] == pytest.approx(expected, rel=1e-5, abs=1e-6)
  assert merged["second"]["kernel"] is params["second"]["kernel"]


def test_merged_keeps_the_dtype_of_the_params_and_rounds_once():
  params, adapters, _ = small()
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  merged = lora.merge(narrow, adapters, SCALE)["first"]["kernel"]
  wide = lora.merge(jax.tree.map(lambda x: x.astype(jnp.float32), narrow), adapters, SCALE)
  assert merged.dtype == jnp.bfloat16
  np.testing.assert_array_equal(merged, wide["first"]["kernel"].astype(jnp.bfloat16))


@pytest.mark.parametrize("target", [STACKED, APART])
def test_the_model_with_merged_params_is_the_model_with_adapters_beside(target):
  model, params = target
  adapters = random_adapters(params)
  apart = {  # by the path inside a layer
    path.removeprefix("layers/"): adapter for path, adapter in random_adapters_apart(adapters)
  }
  order = iter(range(2))
  layer = {"now": None}

  def beside(call, args, kwargs, context):
    """x W + scale (x A) B, in every dense layer that has an adapter."""
    module = context.module
    if isinstance(module, transformer.Block) and context.method_name == "__call__":
      layer["now"] = next(order)
    path = "/".join((str(layer["now"]), *module.path, "kernel"))
    if path in seen or path not in apart or not isinstance(module, nn.Dense):
      return call(*args, **kwargs)  # its parent's own call has been here
    seen.add(path)
    out = call(*args, **kwargs)
    a, b = apart[path]
    return out + SCALE * jnp.matmul(jnp.matmul(args[0], a), b)

  seen = set()
  unstacked = transformer.unstack(params)
  with nn.intercept_methods(beside):
    hidden, _ = model.trunk(unstacked, model.embed(unstacked, TOKENS))
  assert seen == set(apart)
  merged = lora.merge(params, adapters, SCALE)
  found, _ = model.trunk(merged, model.embed(merged, TOKENS))
  np.testing.assert_allclose(found, hidden, atol=2e-5, rtol=1e-4)
  unchanged, _ = model.trunk(params, model.embed(params, TOKENS))
  assert np.abs(unchanged - hidden).max() > 0.1


def random_adapters_apart(adapters):
  for path, (a, b) in adapters.items():
    if a.ndim == 2:
      yield path, lora.Adapter(a, b)
    else:
      for i in range(len(a)):
        yield path.replace("layers/", f"layers/{i}/"), lora.Adapter(a[i], b[i])


def test_gradients_by_hand():
  params, adapters, batch = small()
  x, y = (np.asarray(batch[name], np.float64) for name in ("x", "y"))
  w, v = (np.asarray(params[name]["kernel"], np.float64) for name in ("first", "second"))
  a, b = (np.asarray(half, np.float64) for half in adapters["first/kernel"])
  hidden = np.tanh(x @ w + SCALE * (x @ a) @ b)
  back = 2 * (hidden @ v - y) @ v.T * (1 - hidden**2)  # of the first product, [7, 4]
  loss = lambda adapters: jnp.sum(lora.adapted(squares, params, SCALE)(None, adapters, batch)[0][0])
  found = jax.grad(loss)(adapters)["first/kernel"]
  np.testing.assert_allclose(found.a, SCALE * x.T @ (back @ b.T), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(found.b, SCALE * (x @ a).T @ back, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", [STACKED, APART])
def test_gradients_are_the_whole_gradients_by_the_chain_rule(target):
  model, params = target
  adapters = random_adapters(params)
  loss_fn = likelihood.next_token(model)
  summed = lambda loss_fn, params: jnp.sum(loss_fn(jax.random.key(0), params, BATCH)[0][0])
  merged = lora.merge(params, adapters, SCALE)
  whole = jax.jit(jax.grad(functools.partial(summed, loss_fn)))(merged)
  by_path = {lora.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(whole)}
  of_adapters = jax.jit(
    lambda params, adapters: jax.grad(
      lambda adapters: summed(lora.adapted(loss_fn, params, SCALE), adapters)
    )(adapters)
  )(params, adapters)
  for path, (a, b) in adapters.items():
    g = np.asarray(by_path[path], np.float64)
    found = of_adapters[path]
    size = np.abs(g).max()
    np.testing.assert_allclose(found.a, SCALE * g @ np.swapaxes(b, -1, -2), atol=1e-4 * size)
    np.testing.assert_allclose(found.b, SCALE * np.swapaxes(a, -1, -2) @ g, atol=1e-4 * size)


def update_of(loss_fn, made, num_microbatches=1):
  """The jitted step with the frozen params as an argument, as the module's docstring has it."""

  @functools.partial(jax.jit, donate_argnums=1)
  def update(key, held, batch, frozen):
    return step.train_step(
      key,
      held,
      batch,
      loss_fn=lora.adapted(loss_fn, frozen, SCALE),
      optimizer=made,
      averaging=state.exponential_average(0.9),
      num_microbatches=num_microbatches,
    )

  return update


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_training_moves_adapters_alone_and_learns(num_microbatches):
  model, params = STACKED
  before = jax.tree.map(np.array, params)
  made = optimizer.adamw(lambda step: 0.02, weight_decay=0.0)
  init = lambda key: lora.init(key, params, PATTERNS, 4)
  held = state.init(jax.random.key(0), init, made, state.exponential_average(0.9))
  update = update_of(likelihood.next_token(model), made, num_microbatches)
  losses = []
  for _ in range(12):
    held, metrics = update(jax.random.key(1), held, BATCH, params)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.7 * losses[0]
  jax.tree.map(np.testing.assert_array_equal, params, before)
  assert all(np.abs(b).max() > 0 for _, b in held.params.values())
  # All that the state holds is of the adapters' size.
  largest = max(leaf.size for leaf in jax.tree.leaves(held))
  assert largest == max(leaf.size for leaf in jax.tree.leaves(held.params))


def test_the_frozen_params_are_no_constants_of_the_program():
  model, params = STACKED
  made = optax.sgd(0.1)
  init = lambda key: lora.init(key, params, PATTERNS, 4)
  held = state.init(jax.random.key(0), init, made, state.exponential_average(0.9))
  loss_fn = likelihood.next_token(model)
  arguments = (jax.random.key(1), held, BATCH, params)
  traced = update_of(loss_fn, made).trace(*arguments)
  constants = [np.size(x) for x in traced.jaxpr.consts]
  assert max(constants, default=0) < min(leaf.size for leaf in jax.tree.leaves(params))
  compiled = traced.lower().compile()
  argued = sum(leaf.nbytes for leaf in jax.tree.leaves((held, BATCH, params)))
  assert compiled.memory_analysis().argument_size_in_bytes >= argued
  updated, _ = compiled(*arguments)
  other = jax.tree.map(lambda x: 2 * x, params)  # the same program, other params
  held = state.init(jax.random.key(0), init, made, state.exponential_average(0.9))
  changed, _ = compiled(jax.random.key(1), held, BATCH, other)
  path = next(iter(updated.params))
  assert np.abs(updated.params[path].b - changed.params[path].b).max() > 0


@pytest.mark.parametrize(
  "patterns, rank, complaint",
  [
    (("attention/quarry",), 4, "quarry"),
    (("attention_norm",), 4, "attention_norm"),  # stacked scales are [N, D], and no matrix
    (("query",), 0, "rank=0 is not at least 1"),
  ],
)
def test_wrong_patterns_and_ranks(patterns, rank, complaint):
  with pytest.raises(ValueError, match=complaint):
    lora.init(jax.random.key(0), STACKED[1], patterns, rank)


def test_adapters_of_another_model():
  _, params = STACKED
  adapters = random_adapters(params)
  with pytest.raises(ValueError, match="layers/attention/query/kernel: the adapter is of a matrix"):
    lora.merge(transformer.unstack(params), adapters, 1.0)
