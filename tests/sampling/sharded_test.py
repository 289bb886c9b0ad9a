"""Samplers over a mesh: the tokens of one device, weights that are split, and what travels.

The `eight_*` functions need eight devices: `test_on_eight_devices` runs them in a process that has.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import partition, schedules, toy, transformer
from ancestral.sampling import (
  base,
  decode,
  drafting,
  multistep,
  sharded,
  solvers,
  speculative,
  truncation,
)
from ancestral.sampling import logits as logits_lib

ROWS = {"table": 3, "transformer": 1}  # samples of each prompt
HEADS = {"vocab_size": 24, "num_layers": 1, "width": 32, "num_heads": 4, "num_kv_heads": 2}


def test_on_eight_devices():
  assert "skipped" not in targets.run_on_eight_devices(__file__)


@functools.cache
def target(name):
  if name == "table":
    return targets.table_target(vocab_size=24, order=2)
  model, params = targets.tiny_target(**HEADS)
  return model, transformer.unstack(params)


def surprise_control(aim):
  """Feeds back: a temperature for each row that follows its own surprise, as Mirostat does."""

  def update(model_logits, token, state):
    return state - 0.3 * (-logits_lib.log_prob(model_logits, token) - aim)

  return logits_lib.LogitsTransform(
    lambda batch_size: jnp.ones(batch_size),
    lambda logits, context, state: logits * jnp.exp(-jnp.clip(state, -2, 2))[:, None],
    update,
  )


def sampler(name, traces=None):
  model, _ = target(name)

  def sample(params, settings, keys, prompts):
    if traces is not None:
      traces.append(1)
    transform = logits_lib.chain(
      surprise_control(settings["aim"]),
      truncation.top_k(settings["k"]),
      logits_lib.temperature(settings["t"]),
    )
    return decode.generate(
      model,
      params,
      keys,
      prompts,
      max_new_tokens=6,
      transform=transform,
      stop=(2, 3, 7, 9, 14),
      num_samples=ROWS[name],
      bucket=64,
    )

  return sample


def request(name, num=10, seed=0):
  """(settings, keys, prompts): ragged prompts, settings by row and shared."""
  rows = num * ROWS[name]
  rng = np.random.default_rng(seed)
  prompts = decode.Prompts(
    jnp.asarray(rng.integers(0, 24, (num, 5)), jnp.int32),
    jnp.asarray(rng.integers(1, 6, num), jnp.int32),
  )
  settings = {
    "aim": jnp.asarray(rng.uniform(0.5, 3, rows), jnp.float32),
    "k": jnp.asarray(rng.integers(2, 24, rows), jnp.int32),
    "t": 0.95,
  }
  return settings, base.row_keys(jax.random.key(seed), jnp.arange(rows)), prompts


@functools.cache
def on_one_device(name, seed=0):
  samples = jax.jit(sampler(name))(target(name)[1], *request(name, seed=seed))
  assert len(samples.tokens.devices()) == 1
  return jax.tree.map(np.asarray, samples)


def assert_same(samples, expected):
  """Integers equal; log-probs to the rounding of a sum in another order, in nats."""
  for name, leaf in expected._asdict().items():
    exact = np.issubdtype(leaf.dtype, np.integer)
    np.testing.assert_allclose(
      np.asarray(getattr(samples, name)), leaf, err_msg=name, atol=0 if exact else 5e-5, rtol=0
    )


WAYS = {
  "mapped": (sharded.mapped, 1),
  "jitted": (sharded.jitted, 1),
  "mapped-split": (sharded.mapped, 2),
  "jitted-split": (sharded.jitted, 2),
  "pmapped": (lambda sample, mesh: sharded.pmapped(sample), 1),
}


@pytest.mark.parametrize(
  "name, way",
  [
    ("table", "mapped"),
    ("table", "jitted"),
    ("table", "pmapped"),
    ("transformer", "mapped"),
    ("transformer", "pmapped"),
    ("transformer", "mapped-split"),
    ("transformer", "jitted-split"),
  ],
)
def eight_devices_draw_the_tokens_of_one(name, way):
  """Ten rows on eight (or four pairs of) devices; and a second request compiles nothing."""
  over, num_model = WAYS[way]
  mesh, traces = partition.make_mesh(tensor=num_model), []
  params = sharded.shard(target(name)[1], mesh, head_dim=8)
  run = over(sampler(name, traces), mesh)
  samples = run(params, *request(name))
  expected = on_one_device(name)
  assert_same(samples, expected)
  assert len(set(expected.length - expected.prompt_length)) > 2  # rows end at different steps
  traced = len(traces)
  assert_same(run(params, *request(name, seed=1)), on_one_device(name, 1))
  assert len(traces) == traced
  assert np.any(on_one_device(name, 1).tokens != expected.tokens)


@pytest.mark.parametrize("way", ["mapped", "jitted"])
def eight_devices_speculate_as_one(way):
  model, params = target("table")

  def sample(params, settings, keys, prompts):
    transform = logits_lib.temperature(settings["t"])
    drafter = drafting.by_model(model, params["draft"], num_drafts=3, transform=transform)
    settings = {"max_new_tokens": 6, "transform": transform, "stop": (2, 3, 7)}
    return speculative.generate(model, params["target"], drafter, keys, prompts, **settings)

  settings, keys, prompts = request("table")
  params = {"target": params, "draft": params + jnp.roll(params, 1)}
  arguments = {"t": settings["t"]}, keys[:: ROWS["table"]], prompts
  mesh = partition.make_mesh()
  expected = jax.tree.map(np.asarray, jax.jit(sample)(params, *arguments))
  assert_same(WAYS[way][0](sample, mesh)(sharded.shard(params, mesh), *arguments), expected)
  assert np.any(expected.num_accepted > 0)


def collectives(program):
  """The operations between devices in a compiled program: [(operation, shapes)]."""
  names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
  found = re.findall(rf"= (.+?) ({names})(?:-start)?\(", program.as_text())
  return [(name, re.sub(r"{[\d,]*}", "", shapes)) for shapes, name in found]


def eight_groups_share_nothing_when_mapped():
  """Each loops by itself; jitted, they ask at every step whether all rows are done."""
  mesh = partition.make_mesh()
  for name, way, expected in (
    ("transformer", sharded.mapped, False),
    ("table", sharded.jitted, True),
  ):
    run = jax.jit(way(sampler(name), mesh))
    arguments = sharded.shard(target(name)[1], mesh), *request(name, 8)
    found = collectives(run.lower(*arguments).compile())
    assert (("all-reduce", "pred[]") in found) == expected == bool(found)


def eight_devices_sum_twice_a_layer():
  """Megatron's count: one sum after attention, one after the MLP, and nothing else in the trunk."""
  num_layers, mesh = 3, partition.make_mesh(tensor=2)
  model, params = targets.tiny_target(**{**HEADS, "num_layers": num_layers})
  params = sharded.shard(transformer.unstack(params), mesh, head_dim=8)

  def step(params, settings, keys, tokens):
    cache = model.init_cache(params, tokens.shape[0], 16)
    x = jax.nn.one_hot(tokens, 32)  # not an embedding, which is split by the vocabulary
    hidden, cache = model.trunk(params, x, cache)
    return hidden, cache.layers[0].keys

  keys, tokens = base.row_keys(jax.random.key(0), jnp.arange(8)), jnp.ones((8, 1), jnp.int32)
  program = jax.jit(sharded.mapped(step, mesh)).lower(params, {}, keys, tokens).compile()
  assert collectives(program) == [("all-reduce", "f32[2,32]")] * (2 * num_layers)


@pytest.mark.parametrize("stacked", [True, False])
def eight_devices_hold_their_part_of_the_weights(stacked):
  mesh = partition.make_mesh(tensor=2)
  _, params = targets.tiny_target(**HEADS, use_bias=True, qk_norm=True, tied_embeddings=False)
  if not stacked:
    params = transformer.unstack(params)
  placed = sharded.shard(params, mesh, head_dim=8)
  jax.tree.map(np.testing.assert_array_equal, placed, params)
  local = lambda leaf: {shard.data.shape for shard in leaf.addressable_shards}
  assert local(placed["embedding"]) == {(12, 32)} and local(placed["readout"]) == {(32, 12)}
  layer = placed["layers"] if stacked else placed["layers"][0]
  lead = (1,) if stacked else ()
  assert local(layer["attention"]["query"]["kernel"]) == {(*lead, 32, 16)}
  assert local(layer["attention"]["key"]["bias"]) == {(*lead, 8)}
  assert local(layer["attention"]["output"]["kernel"]) == {(*lead, 16, 32)}
  assert local(layer["attention"]["output"]["bias"]) == {(*lead, 32)}
  assert local(layer["mlp"]["down"]["kernel"]) == {(*lead, 48, 32)}
  held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))
  assert held < 0.52 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def eight_devices_take_rows_that_they_divide():
  mesh = partition.make_mesh(fsdp=2, tensor=2)
  with pytest.raises(ValueError, match="3 rows do not divide into 4 devices"):
    sharded.rows(jnp.ones((3, 2)), mesh)
  placed = sharded.rows({"x": jnp.ones((8, 2)), "t": 0.5}, mesh)
  assert {shard.data.shape for shard in placed["x"].addressable_shards} == {(2, 2)}
  assert placed["t"].sharding.is_fully_replicated


def test_one_device_may_be_pmapped_too():
  samples = sharded.pmapped(sampler("table"))(target("table")[1], *request("table"))
  assert_same(samples, on_one_device("table"))


def eight_devices_diffuse_as_one_does():
  """The table is shared, so it travels with the params."""
  schedule = schedules.rectified_flow()
  table = multistep.dpmpp_2m(schedule, np.linspace(0.95, 0, 5), eta=1.0)
  means = jnp.array([[1.0, -0.5], [-0.8, 0.4]])

  def sample(params, settings, keys, x):
    means, table = params
    mixture = toy.GaussianMixture(jnp.array([0.4, 0.6]), means, jnp.array([0.1, 0.3]))
    return solvers.sample(keys, toy.mixture_denoiser(mixture, schedule), table, x)

  keys, x = targets.keys_of(range(10)), jnp.linspace(-1, 1, 20).reshape(10, 2)
  alone = jax.jit(sample)((means, table), {}, keys, x)
  mesh = partition.make_mesh()
  runs = sharded.jitted(sample, mesh), sharded.mapped(sample, mesh), sharded.pmapped(sample)
  for run in runs:
    np.testing.assert_allclose(run((means, table), {}, keys, x), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda s, k, i: (s, k[:9], i), r"keys of shape \(9,\) has no entry for each of 10 requests"),
    (
      lambda s, k, i: ({**s, "bias": jnp.zeros(24)}, k, i),
      r"settings\['bias'\] of shape \(24,\).*10 requests; what they share belongs in params",
    ),
    (lambda s, k, i: (s, k, (i.tokens, jnp.int32(3))), r"inputs\[1\] of shape \(\)"),
  ],
)
def test_what_has_no_rows_is_named(change, message):
  run = sharded.mapped(sampler("table"), partition.make_mesh())
  with pytest.raises(ValueError, match=message) as error:
    run(target("table")[1], *change(*request("table")))
  assert "\n" not in str(error.value)


def test_shared_arrays_travel_with_the_params():
  """A bias [V] may be as long as there are rows, and is still shared."""
  model, params = targets.markov_target()
  bias = jnp.array([-np.inf, 0.0, 0.0, -np.inf, 0.0])

  def sample(params, settings, keys, prompts):
    weights, bias = params
    transform = logits_lib.stateless(lambda logits: logits + bias[None])
    return decode.generate(model, weights, keys, prompts, max_new_tokens=3, transform=transform)

  keys = base.row_keys(jax.random.key(0), jnp.arange(5))
  prompts = decode.Prompts(jnp.ones((5, 1), jnp.int32), jnp.ones(5, jnp.int32))
  samples = sharded.mapped(sample, partition.make_mesh())((params, bias), {}, keys, prompts)
  assert not np.isin(samples.tokens, (0, 3)).any()
