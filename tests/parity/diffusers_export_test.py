"""Folders of `diffusers_layout.save` are read by diffusers, and diffusers' own by `load`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.models import diffusers_layout, dit, unet
from parity import networks_test

pytestmark = pytest.mark.peers

CONFIGS = {
  "dit": dit.DiTConfig(
    image_shape=(12, 12, 3), patch_size=4, num_layers=2, width=48, num_heads=3, num_classes=5
  ),
  "unet": unet.UNetConfig(
    image_shape=(8, 12, 1), channels=32, attention=(0,), num_blocks=1, head_dim=16, num_classes=5
  ),
  "deep": unet.UNetConfig(
    image_shape=(8, 8, 3), channels=16, multipliers=(1, 2, 4), attention=(1, 2), head_dim=8,
    num_groups=4, num_classes=3,
  ),
}  # fmt: skip


def made(name):
  config = CONFIGS[name]
  network = dit.dit(config) if name == "dit" else unet.unet(config)
  params = network.init(jax.random.key(0), jnp.zeros((1, *config.image_shape)))
  return network, networks_test.randomised(params, jax.random.key(2)), config


def model_of(name):
  import diffusers

  return diffusers.DiTTransformer2DModel if name == "dit" else diffusers.UNet2DModel


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_reads_it_and_computes_the_same(tmp_path, name):
  network, params, config = made(name)
  diffusers_layout.save(tmp_path, params, config)
  model, report = model_of(name).from_pretrained(tmp_path, output_loading_info=True)
  assert not any(report.values()), report
  networks_test.compare(network, params, model.eval(), config.image_shape, config.num_classes)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_diffusers_saves_is_read_back(tmp_path, name):
  _, params, config = made(name)
  diffusers_layout.save(tmp_path / "ours", params, config)
  model_of(name).from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
  found, read = diffusers_layout.load(tmp_path / "theirs")
  assert read == config
  jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(params))


def test_a_model_that_differs_is_refused(tmp_path):
  import diffusers

  settings = diffusers_layout.unet_settings(CONFIGS["unet"]) | {"act_fn": "gelu"}
  diffusers.UNet2DModel(**settings).save_pretrained(tmp_path)
  with pytest.raises(ValueError, match="act_fn='gelu'; ours has 'silu'"):
    diffusers_layout.load(tmp_path)
