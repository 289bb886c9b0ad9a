"""Diffusion networks over eight devices: the step and the samples of one; and lowered for others.

`eight_devices` needs eight: `test_on_eight_devices` runs it in a process that has them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import targets
from ancestral.models import base, dit, precondition, schedules, unet
from ancestral.sampling import base as sampling
from ancestral.sampling import grids, multistep, sharded, solvers
from ancestral.training import averaging, denoising, state, step, weightings

SHAPE, NUM_CLASSES, PATH = (8, 8, 1), 3, schedules.variance_exploding()
NETWORKS = {
  "dit": dit.dit(
    dit.DiTConfig(
      image_shape=SHAPE, patch_size=4, num_layers=1, width=16, num_heads=2, num_classes=NUM_CLASSES
    )
  ),
  "unet": unet.unet(
    unet.UNetConfig(
      image_shape=SHAPE,
      channels=8,
      num_blocks=1,
      head_dim=8,
      num_groups=4,
      num_classes=NUM_CLASSES,
    )
  ),
}
OPTIMIZER, AVERAGING = optax.sgd(0.1), averaging.power_average((0.1, 0.05))


def parts(name):
  """The model, a step of its training, and what makes the state before it, no parameter zero."""
  network = NETWORKS[name]
  model = denoising.network_denoiser(network, PATH, precondition.karras(0.5), 0.5)
  loss_fn = denoising.denoising(
    model,
    PATH,
    weightings.karras(0.5),
    weightings.log_normal(PATH),
    num_classes=NUM_CLASSES,
    drop_condition=0.1,
  )

  def init(key):
    params = network.init(key, jnp.zeros((1, *SHAPE)))
    return jax.tree.map(
      lambda leaf: leaf + 0.05 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params
    )

  start = jax.jit(lambda: state.init(jax.random.key(0), init, OPTIMIZER, AVERAGING))
  run = lambda held, batch: step.train_step(
    jax.random.key(1), held, batch, loss_fn=loss_fn, optimizer=OPTIMIZER, averaging=AVERAGING
  )
  return model, run, start


def images(num):
  rng = np.random.default_rng(0)
  x = rng.uniform(-1, 1, (num, *SHAPE)).astype(np.float32)
  return {"x": x, "label": np.arange(num, dtype=np.int32) % NUM_CLASSES}


def close(found, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    *map(jax.device_get, (found, expected)),
  )


@pytest.mark.parametrize("name", NETWORKS)
def eight_devices(name):
  model, run, start = parts(name)
  held = start()
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  split, copied = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
  run = jax.jit(run)
  spread = run(jax.device_put(held, copied), jax.device_put(images(16), split))
  close(spread, run(held, images(16)))

  table = multistep.dpmpp_2m(PATH, grids.to_zero(grids.karras(PATH, 2, end=0.01)))

  def sample(params, settings, keys, labels):
    del settings
    denoise = lambda x, t: model(params, x, t, base.Condition(labels))
    return solvers.sample(keys, denoise, table, jnp.zeros((labels.shape[0], *SHAPE)))

  keys, labels = sampling.row_keys(jax.random.key(0), jnp.arange(12)), jnp.arange(12) % NUM_CLASSES
  expected = jax.jit(sample)(held.params, {}, keys, labels)
  for over in (sharded.mapped, sharded.jitted):
    close(over(sample, mesh)(held.params, {}, keys, labels), expected)


@pytest.mark.parametrize("name", ["dit", pytest.param("unet", marks=pytest.mark.slow)])
def test_on_eight_devices(name):
  assert "1 passed" in targets.run_on_eight_devices(__file__, "-k", name)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_step_is_lowered_for_other_platforms(name, platform):
  _, run, start = parts(name)
  lowered = (
    jax.jit(run).trace(jax.eval_shape(start), images(4)).lower(lowering_platforms=(platform,))
  )
  assert "stablehlo" in lowered.as_text()
