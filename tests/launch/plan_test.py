"""What a plan says against what is: parameters exactly, XLA's own account of memory within 10%."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.configs import arithmetic, image_diffusion, text
from ancestral.launch import experiment, fields, plan, supervised
from ancestral.models import partition
from ancestral.training import budget, chips, memory, sharding


def changed(config, **values):
  with config.unlocked():
    for name, value in values.items():
      *path, last = name.split("__")
      section = config
      for part in path:
        section = section[part]
      section[last] = value
  return config


CASES = {
  "arithmetic": lambda: arithmetic.get_config("tiny"),
  "text": lambda: changed(text.get_config(), model__remat="full"),
  "microbatches": lambda: changed(
    text.get_config(), model__remat="products", train__num_microbatches=4
  ),
  "wide": lambda: changed(
    text.get_config(),
    model__width=512,
    model__num_heads=8,
    model__num_layers=3,
    train__batch_size=8,
  ),
  "digits": image_diffusion.get_config,
}


def compiled(config):
  """XLA's account of the step, on the mesh of the configuration, and the state's shapes."""
  made, mesh = experiment.build(config), fields.mesh_of(config)
  abstract = experiment.abstract_state(made, mesh)
  at = jax.NamedSharding(mesh, jax.P(partition.ROWS))
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
    plan.batch_of(made, config.train.batch_size),
  )
  with jax.set_mesh(mesh):
    step = jax.jit(
      supervised.step_of(made),
      donate_argnums=1,
      out_shardings=(sharding.shardings(abstract), None),
    )
    return step.lower(jax.random.key(0), abstract, batch).compile().memory_analysis(), abstract


def check(config, tolerance):
  found, (xla, abstract) = plan.plan(config, chips.H100, jax.device_count()), compiled(config)
  params = jax.tree.leaves(abstract.params)
  assert found.num_params == sum(np.prod(x.shape) for x in params)
  local = [4 * np.prod(x.sharding.shard_shape(x.shape)) for x in params]
  assert found.held.params == sum(local)
  # The arguments are the state, the batch and a key.
  assert 0 <= xla.argument_size_in_bytes - sum(found.held) < 2e6
  assert found.peak == pytest.approx(
    xla.argument_size_in_bytes + xla.temp_size_in_bytes, rel=tolerance
  )


@pytest.mark.parametrize("name", CASES)
def test_memory_is_that_of_the_compiled_step(name, optimised):
  check(CASES[name](), 0.1)


MESHES = [{}, {"fsdp": 8}, {"tensor": 4}, {"fsdp": 2, "tensor": 2}, {"sequence": 2}]


@pytest.mark.parametrize("sizes", MESHES)
def eight_devices_hold_what_the_plan_says(sizes, optimised):
  """Exactly, of what lives on; within 20% at the peak."""
  check(changed(text.get_config(), **{f"mesh__{axis}": n for axis, n in sizes.items()}), 0.2)


@pytest.mark.slow
def test_on_eight_devices():
  assert f"{len(MESHES)} passed" in targets.run_on_eight_devices(__file__)


def test_peak_of_a_chain_by_hand():
  """x [1000], and [1000, 1000]: none where it is summed at once, one if used twice, then two."""
  x = jax.ShapeDtypeStruct((1000,), np.float32)
  fused = lambda x: jnp.sum(jnp.exp(x[:, None] * x[None, :]))
  assert memory.peak(fused, x) < 1e5
  twice = lambda x: (lambda a: jnp.sum(a * a))(x[:, None] * x[None, :])
  assert memory.peak(twice, x) == pytest.approx(4e6 + 4e3, rel=1e-3)
  kept = lambda x: (lambda a: (a @ a, a))(x[:, None] * x[None, :])
  assert memory.peak(kept, x) == pytest.approx(8e6 + 4e3, rel=1e-3)


def test_a_loop_takes_one_turn_of_memory_and_stacks_its_results():
  x = jax.ShapeDtypeStruct((1000,), np.float32)

  def loop(x):
    turn = lambda carry, _: (carry + (carry[:, None] @ carry[None, :]).sum(0), carry)
    return jax.lax.scan(turn, x, None, length=10)

  assert memory.peak(loop, x) == pytest.approx(4e6 + 10 * 4e3, rel=0.01)


def test_a_barrier_passes_each_array_on():
  x = jax.ShapeDtypeStruct((1000, 1000), np.float32)

  def kept(a, b):
    a, b = jax.lax.optimization_barrier((a, b))
    return a @ b, a, b

  assert memory.peak(kept, x, x) == pytest.approx(12e6)


def test_traffic_by_hand():
  """Of 1,000 parameters on 2 x 4 x 1 x 2 devices, two microbatches, two layers."""
  own = budget.Held(params=4 * 1000 // 8, optimizer=1000, average=0, frozen=0)
  moved = budget.traffic(
    own,
    sum(own) + own.params + 10_000,
    1000,
    {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 2},
    rows=3,
    num_microbatches=2,
    remade=False,
    layers=budget.Layers(2, activations=64, key_values=32),
  )
  assert moved.data == 2 * 1 / 2 * 500
  assert moved.fsdp == 3 * 2 * 3 / 4 * 2000
  assert moved.sequence == 0
  assert moved.tensor == 4 * 2 * 1 / 2 * 3 * 2 * 64
  assert moved.memory == 2 * 2000 * 2 + 3 * 500 + 2 * 1000 + 2 * 2 * 10_000
  seconds = budget.roofline(16e12, moved, chips.Chip("a", 1e12, 1e3, 1e9, 1e3), 16)
  assert seconds.compute == 1 and seconds.memory == moved.memory / 1e3
  assert seconds.overlapped == max(seconds) and seconds.apart > seconds.overlapped


def test_the_command(command):
  flags = ["--config=configs/text.py", "--chip=v5e", "--devices=16", "--config.mesh.fsdp=16"]
  outcome = command(plan, *flags)
  assert outcome.status == 0 and "16 x TPU v5e, mesh: fsdp=16" in outcome.out
  assert "837,120" in outcome.out and "utilisation at most" in outcome.out
  printed = json.loads(command(plan, *flags, "--json").out)
  assert printed["num_params"] == 837120 and printed["mesh"]["fsdp"] == 16
  assert printed["held"]["params"] < 837120 * 4 / 15


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--devices=6", "--config.mesh.fsdp=4"], "does not fill the 6 devices"),
    (["--devices=64"], "batch_size=32 in 1 microbatches does not divide over the 64 devices"),
    ([], "--config is missing"),
  ],
)
def test_bad_input_is_one_line(command, flags, message):
  config = ["--config=configs/text.py"] if flags else []
  outcome = command(plan, *config, *flags)
  assert outcome.status == 2 and message in outcome.err and outcome.err.count("\n") == 1
