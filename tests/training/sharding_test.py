"""The same training over meshes of eight devices: losses, samples, a round, and what travels.

The `eight_*` functions need eight devices: `test_on_eight_devices` runs them in a process that has.
"""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import targets
from ancestral.evaluation import attempts
from ancestral.models import base, partition, transformer
from ancestral.sampling import decode, logits, sharded
from ancestral.tasks import base as tasks
from ancestral.tasks import tokenizer as tokenizers
from ancestral.training import (
  advantages,
  aggregation,
  learning,
  likelihood,
  objectives,
  optimizer,
  policy,
  rollouts,
  selection,
  sharding,
  state,
  step,
)

MESHES = {
  "data=8": {"data": 8},
  "fsdp=8": {"fsdp": 8},
  "data=2,tensor=4": {"data": 2, "tensor": 4},
  "all_axes": {"data": 2, "fsdp": 2, "tensor": 2},
  "fsdp=2,sequence=4": {"fsdp": 2, "sequence": 4},
}
LENGTH, BATCH, STEPS = 16, 16, 20
CONFIG = targets.tiny_config(vocab_size=24, num_kv_heads=4, tied_embeddings=False)
MODEL = transformer.transformer(CONFIG)
RULES = partition.rules(CONFIG.resolved().head_dim)
OPTIMIZER = optimizer.adamw(optax.constant_schedule(1e-2))
AVERAGING = state.exponential_average(0.9)
key = functools.partial(jax.random.key, 1)  # anew for each use


def init(init_key):
  return state.init(
    init_key, lambda k: MODEL.init(k, jnp.zeros((1, 1), jnp.int32)), OPTIMIZER, AVERAGING
  )


def _fresh_init():
  """A function of its own, which is traced with the optimizer of now."""
  return lambda init_key: init(init_key)


def on(over_data=False, **shape):
  """A mesh of the first devices, and a state's shapes on it."""
  num = int(np.prod(list(shape.values())))
  mesh = partition.make_mesh(**shape, devices=jax.devices()[:num])
  return mesh, sharding.of_state(
    jax.eval_shape(_fresh_init(), key()), mesh, RULES, over_data=over_data
  )


def made(abstract):
  return jax.jit(_fresh_init(), out_shardings=sharding.shardings(abstract))(key())


def update_of(abstract, loss_fn=None, num_microbatches=1):
  return jax.jit(
    functools.partial(
      step.train_step,
      loss_fn=loss_fn or likelihood.next_token(MODEL, chunk=LENGTH),
      optimizer=OPTIMIZER,
      averaging=AVERAGING,
      num_microbatches=num_microbatches,
    ),
    donate_argnums=1,
    out_shardings=(sharding.shardings(abstract), None),
  )


def batch_of(number):
  """Rows of which each next token is the last one's double and a bit of noise, some masked."""
  rng = np.random.default_rng(number)
  tokens = np.zeros((BATCH, LENGTH + 1), np.int32)
  tokens[:, 0] = rng.integers(24, size=BATCH)
  for t in range(LENGTH):
    tokens[:, t + 1] = (2 * tokens[:, t] + rng.integers(3, size=BATCH)) % 24
  mask = (rng.random((BATCH, LENGTH)) < 0.8).astype(np.float32)
  return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask}


def trained(over_data=False, num_microbatches=1, num_steps=STEPS, **shape):
  """Losses of the steps, and the params after them."""
  mesh, abstract = on(over_data, **shape)
  update = update_of(abstract, num_microbatches=num_microbatches)
  with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
    held, losses = made(abstract), []
    for number in range(num_steps):
      held, metrics = update(key(), held, sharding.rows(batch_of(number), mesh))
      losses.append(metrics["loss"])
    assert update._cache_size() == 1
  assert jax.tree.map(lambda x: x.sharding, held) == sharding.shardings(abstract)
  return np.array(jax.device_get(losses)), held.params


@functools.cache
def alone():
  losses, params = trained(data=1)
  return losses, jax.device_get(params)


def test_on_eight_devices():
  chosen = "not as_one or all_axes"
  assert "skipped" not in targets.run_on_eight_devices(__file__, "-k", chosen)


@pytest.mark.slow
def test_each_way_on_eight_devices():
  chosen = "as_one and not all_axes"
  assert "skipped" not in targets.run_on_eight_devices(__file__, "-k", chosen)


@pytest.mark.parametrize("name", MESHES)
def eight_devices_train_as_one(name):
  losses, _ = trained(**MESHES[name])
  assert alone()[0][0] - alone()[0][-1] > 1  # nats: something is learned
  np.testing.assert_allclose(losses, alone()[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  "way", [{"over_data": True}, {"num_microbatches": 2}, {"over_data": True, "num_microbatches": 2}]
)
def eight_devices_train_as_one_in_parts(way):
  losses, _ = trained(**way, data=4, fsdp=2)
  np.testing.assert_allclose(losses, alone()[0], rtol=0, atol=1e-5)


def eight_devices_train_as_one_by_muon(monkeypatch):
  """Which makes whole matrices orthogonal, however they are split."""
  muon = optimizer.muon(optax.constant_schedule(1e-2))
  monkeypatch.setitem(globals(), "OPTIMIZER", muon)
  losses = [trained(**shape)[0] for shape in ({"data": 1}, MESHES["all_axes"])]
  np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)
  assert losses[0][0] - losses[0][-1] > 1


@functools.cache
def gaps(num_new=8):
  """One device's greedy tokens, and the gap in logits between the first two at each."""
  samples = draw(alone()[1], greedy=True)
  tokens = jnp.asarray(samples.tokens)
  hidden, _ = targets.apply(MODEL, alone()[1], tokens[:, :-1])
  best = jnp.sort(MODEL.readout(alone()[1], hidden), axis=-1)
  return samples, np.asarray(best[..., -1] - best[..., -2])[:, -num_new:]


def draw(params, greedy, num_new=8):
  prompts = targets.prompts_of([[1 + i, 2 * i, 3] for i in range(8)])
  transform = logits.greedy() if greedy else logits.temperature(0.9)
  sample = jax.jit(
    lambda params, keys, prompts: decode.generate(
      MODEL, params, keys, prompts, max_new_tokens=num_new, transform=transform
    )
  )
  return sharded.to_host(
    sample(jax.jit(transformer.unstack)(params), targets.keys_of(range(8)), prompts)
  )


@pytest.mark.parametrize("name", MESHES)
def eight_devices_draw_as_one(name):
  mesh, abstract = on(**MESHES[name])
  with jax.default_matmul_precision("highest"):
    expected, gap = gaps()
    drawn = draw(alone()[1], greedy=False)
    with jax.set_mesh(mesh):
      params = jax.device_put(alone()[1], sharding.shardings(abstract).params)
      greedy, random = draw(params, greedy=True), draw(params, greedy=False)
  clear = np.logical_and.accumulate(gap > 1e-4, axis=1)  # after a tie, texts may part
  assert clear.mean() > 0.9 and len(np.unique(expected.tokens[:, 3:])) > 4
  np.testing.assert_array_equal(greedy.tokens[:, 3:][clear], expected.tokens[:, 3:][clear])
  np.testing.assert_array_equal(random.tokens, drawn.tokens)
  np.testing.assert_allclose(random.log_prob, drawn.log_prob, atol=1e-4)


def eight_devices_hold_parts_of_the_cache():
  mesh, _ = on(**MESHES["all_axes"])
  with jax.set_mesh(mesh):
    cache = jax.jit(lambda: MODEL.init_cache(None, 8, 16))()
  shapes = {shard.data.shape for shard in cache.layers[0].keys.addressable_shards}
  assert shapes == {(2, 2, 16, 8)}  # of [8, 4, 16, 8]


TOKENIZER = tokenizers.characters("0123456789abcdefghijk")  # and three specials: 24
TASK = tasks.Task(
  problem=None,
  verify=lambda problem, text: tasks.Verification(text[:1] in problem.answer, ""),
  tokenizer=TOKENIZER,
)
PROBLEMS = [tasks.Problem(bin(i)[2:], "0123456789", {"key": str(i), "level": 1}) for i in range(8)]
GROUP, NEW = 4, 4


def a_round(shape):
  """The tokens drawn in a round of GRPO with a clipped surrogate, and the params after it."""
  mesh, abstract = on(**shape)
  sample = rollouts.sampler(MODEL, group_size=GROUP, max_new_tokens=NEW, stop=(TOKENIZER.eos,))
  unstacked, drawn = jax.jit(transformer.unstack), []

  def roll_out(key, params, problems):
    made = rollouts.roll_out(
      sample,
      unstacked(params),
      TASK,
      problems,
      key,
      verify_all=attempts.in_process(TASK.verify),
      temperature=1.0,
      group_size=GROUP,
      batch_size=32,
      max_length=16,
      max_new_tokens=NEW,
    )
    drawn.append(made.rows["targets"])
    return made

  loss_fn = objectives.of_tokens(
    MODEL, [objectives.surrogate(policy.ppo_clip)], aggregation.sequence_sum, temperature=1.0
  )
  parts = learning.Round(
    roll_out,
    learning.verified,
    selection.all_samples(lambda rewards, lengths: np.asarray(advantages.group_centred(rewards))),
    lambda params, minibatch: minibatch,
    update_of(abstract, loss_fn),
    lambda count, made, rewards: None,
  )
  run = learning.round_step(parts, capacity=32, num_minibatches=2)
  with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
    held, metrics = run(key(), made(abstract), PROBLEMS)
  assert metrics["selected"] == 32 and 0 < metrics["correct"] < 1
  return drawn[0], jax.device_get(held.params), metrics


@functools.cache
def a_round_alone():
  return a_round({"data": 1})


@pytest.mark.parametrize("name", MESHES)
def eight_devices_learn_as_one(name):
  drawn, params, metrics = a_round(MESHES[name])
  expected = a_round_alone()
  np.testing.assert_array_equal(drawn, expected[0])
  for key in ("loss", "reward", "ratio"):
    assert abs(metrics[key] - expected[2][key]) < 1e-5
  # A first step of Adam divides by the gradient itself, also where that is rounding: steps of 1e-2.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, expected[1])


OPERATIONS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def collectives(compiled):
  """[(operation, elements moved, what of)] in a compiled program."""
  found = []
  for line in compiled.as_text().splitlines():
    if match := re.search(rf"= (.+?) ({OPERATIONS})(?:-start)?\(", line):
      shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
      sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
      found.append((match[2], sizes, line))
  return found


def count(found):
  return collections.Counter(name for name, _, _ in found)


def compiled_step(over_data=False, **shape):
  mesh, abstract = on(over_data, **shape)
  with jax.set_mesh(mesh):
    held, batch = made(abstract), sharding.rows(batch_of(0), mesh)
    return collectives(update_of(abstract).lower(key(), held, batch).compile()), held, batch, mesh


def num_elements(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def eight_devices_sum_gradients_once_and_gather_nothing():
  """Over "data", a step moves the gradient once, and numbers."""
  found, held, _, _ = compiled_step(data=8)
  assert set(count(found)) == {"all-reduce"}
  moved = sum(sum(sizes) for _, sizes, _ in found)
  written = held.params | {"layers": jax.tree.map(lambda x: x[0], held.params["layers"])}  # a loop
  numbers = moved - num_elements(written)
  assert 0 <= numbers < 20


def gathers_of_the_gradient_alone(held, batch, mesh):
  loss_fn = likelihood.next_token(MODEL, chunk=LENGTH)
  total = lambda params, batch: jnp.sum(loss_fn(key(), params, batch)[0][0])
  with jax.set_mesh(mesh):
    return collectives(jax.jit(jax.value_and_grad(total)).lower(held.params, batch).compile())


def eight_devices_gather_a_layers_parameters_and_nothing_of_the_optimiser():
  """Over "fsdp", what is gathered is what the gradient alone gathers: kernels, twice each."""
  found, held, batch, mesh = compiled_step(fsdp=8)
  only = gathers_of_the_gradient_alone(held, batch, mesh)
  assert count(found)["all-gather"] == count(only)["all-gather"]
  layer = jax.tree.map(lambda x: x[0], held.params["layers"])
  kernels = [leaf.size for leaf in jax.tree.leaves(layer) if leaf.ndim == 2]
  tables = [held.params[name].size for name in ("embedding", "readout")]
  gathered = [size for name, sizes, _ in found if name == "all-gather" for size in sizes]
  assert set(gathered) <= set(kernels + tables)
  assert len(kernels) + 2 <= len(gathered) <= 2 * (len(kernels) + 2)  # forward, and again backward
  assert set(count(found)) <= {"all-gather", "all-reduce", "reduce-scatter"}


def eight_devices_gather_new_parameters_where_the_optimiser_is_split():
  """Over "data", the optimiser's arrays are an eighth each, and parameters gathered once."""
  found, held, _, _ = compiled_step(over_data=True, data=8)
  moments = [leaf for leaf in jax.tree.leaves(held.optimizer) if leaf.ndim > 2]
  assert moments and all(leaf.addressable_shards[0].data.size * 8 == leaf.size for leaf in moments)
  gathered = sum(sum(sizes) for name, sizes, _ in found if name == "all-gather")
  assert 0.9 * num_elements(held.params) < gathered <= num_elements(held.params)


def eight_devices_sum_activations_twice_a_layer_each_way():
  """Over "tensor", Megatron's count: two forward and two backward, in the bodies of the scans."""
  found, _, _, _ = compiled_step(data=2, tensor=4)
  rows = BATCH // 2 * LENGTH * 32
  activations = [n for name, sizes, _ in found if name == "all-reduce" for n in sizes if n == rows]
  # 2 forward; backward one sum for each of query, key, value, gate, up, which XLA may join; and the
  # embedding's and the readout's.
  assert 4 <= len(activations) <= 2 + 5 + 2
  assert not any(max(sizes) > rows for name, sizes, _ in found if name == "all-gather")


def test_a_batch_that_does_not_divide():
  mesh = jax.sharding.AbstractMesh((4, 2, 1, 1), partition.AXES)
  with pytest.raises(ValueError, match="A batch of 12 does not divide over the 8 devices of data"):
    sharding.share(mesh, 12)


def test_one_process_reads_all():
  assert sharding.share(partition.make_mesh(devices=jax.devices()[:1]), 6) == (0, 1)


@pytest.mark.parametrize("remat", ["full", "products"])
def test_what_is_made_again_does_not_change_a_gradient(remat):
  config = targets.tiny_config(vocab_size=24, remat=remat, dropout=0.1)
  plain = targets.tiny_config(vocab_size=24, dropout=0.1)
  params = targets.fixed_params(transformer.transformer(plain))

  def gradient(config):
    loss_fn = likelihood.next_token(transformer.transformer(config), chunk=LENGTH)
    total = lambda params: jnp.sum(loss_fn(key(), params, batch_of(0))[0][0])
    kept = jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(total, params)[1], params))
    return jax.jit(jax.grad(total))(params), sum(leaf.size for leaf in kept)

  with jax.default_matmul_precision("highest"):
    (found, kept), (expected, whole) = gradient(config), gradient(plain)
  assert kept < 0.8 * whole
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found, expected)


def test_remat_is_checked():
  with pytest.raises(ValueError, match="remat='some' is not one of"):
    targets.tiny_config(remat="some")
  assert isinstance(transformer.transformer(CONFIG), base.LanguageModel)
