"""Folders in diffusers' layout come back bit for bit, and wrong ones are refused.

That diffusers reads them and computes the same is in parity/diffusers_export_test.py.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from ancestral.models import diffusers_layout, dit, unet

DIT = dit.DiTConfig(
  image_shape=(8, 8, 2), patch_size=2, num_layers=2, width=16, num_heads=2, num_classes=3
)
UNET = unet.UNetConfig(image_shape=(4, 8, 2), channels=8, num_blocks=1, head_dim=4, num_groups=4)
WITH_CLASSES = dataclasses.replace(UNET, num_classes=3, multipliers=(1, 3), attention=(0,))
WEIGHTS = "diffusion_pytorch_model.safetensors"


def params_of(config):
  """Numbers that are all different, in the network's shapes."""
  network = dit.dit(config) if isinstance(config, dit.DiTConfig) else unet.unet(config)
  x = jnp.zeros((1, *config.image_shape))
  shapes = jax.eval_shape(network.init, jax.random.key(0), x)
  generator = np.random.default_rng(0)
  return jax.tree.map(lambda x: generator.normal(size=x.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("config", [DIT, UNET, WITH_CLASSES])
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, config):
  params = params_of(config)
  diffusers_layout.save(tmp_path / "new", params, config)
  found, read = diffusers_layout.load(tmp_path / "new")
  assert read == config
  assert jax.tree.structure(found) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, found, params)
  assert {path.name for path in (tmp_path / "new").iterdir()} == {"config.json", WEIGHTS}


def test_what_does_not_belong_to_the_weights_is_not_kept(tmp_path):
  config = dataclasses.replace(UNET, dropout=0.1, dtype="bfloat16")
  diffusers_layout.save(tmp_path, params_of(UNET), config)
  assert diffusers_layout.load(tmp_path)[1] == UNET


@pytest.mark.parametrize(
  "config, message",
  [
    (dataclasses.replace(DIT, num_registers=2), "num_registers=0, not 2"),
    (dataclasses.replace(DIT, num_classes=None), "square images with classes"),
    (dataclasses.replace(UNET, multipliers=(2, 4)), "multipliers.0.=1, not 2"),
  ],
)
def test_networks_that_diffusers_lacks_are_refused(tmp_path, config, message):
  with pytest.raises(ValueError, match=message):
    diffusers_layout.save(tmp_path / "new", params_of(config), config)
  assert not (tmp_path / "new").exists()


def folder(tmp_path, config=DIT, tensors=None, **settings):
  """A folder of the config's with settings, and tensors, changed; one of None is left out."""
  diffusers_layout.save(tmp_path, params_of(config), config)
  path = tmp_path / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | settings))
  state = safetensors_numpy.load_file(tmp_path / WEIGHTS)
  state |= tensors or {}
  kept = {name: array for name, array in state.items() if array is not None}
  safetensors_numpy.save_file(kept, tmp_path / WEIGHTS)
  return tmp_path


EMBEDDER = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"


@pytest.mark.parametrize(
  "tensors, message",
  [
    ({"proj_out_1.bias": None}, "lacks 1 tensors, such as proj_out_1.bias"),
    ({"pos_embed.other": np.ones(2)}, "has, and we have not, 1 tensors, such as pos_embed.other"),
    ({"proj_out_1.bias": np.ones(31)}, r"proj_out_1.bias is \(31,\), and of this network \(32,\)"),
    ({"proj_out_2.weight": np.ones((16, 8))}, r"is \(16, 8\), and of this network \(8, 16\)"),
    ({"pos_embed.proj.weight": np.ones((16, 2))}, r"network \(16, 2, 2, 2\)"),
    ({EMBEDDER: np.ones(16, np.float32)}, "differs from that of other blocks"),
  ],
)
def test_wrong_tensors_are_refused(tmp_path, tensors, message):
  with pytest.raises(ValueError, match=message) as error:
    diffusers_layout.load(folder(tmp_path, tensors=tensors))
  assert WEIGHTS in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  "config, settings, message",
  [
    (DIT, {"_class_name": "FluxTransformer2DModel"}, "is of FluxTransformer2DModel, not of DiT"),
    (DIT, {"norm_eps": 1e-6}, "norm_eps=1e-06; ours has 1e-05"),
    (DIT, {"out_channels": 4}, "out_channels=4; ours has 2"),
    (DIT, {"brand_new": 1}, "brand_new=1; which is not known here"),
    (DIT, {"patch_size": 3}, "of no network of ours"),
    (UNET, {"sample_size": 8}, "of no network of ours"),
    (UNET, {"block_out_channels": [8, 12]}, r"block_out_channels=\[8, 12\]; ours has \[8, 8\]"),
    (UNET, {"up_block_types": ["UpBlock2D"] * 2}, "up_block_types="),
    (UNET, {"mid_block_type": None}, "mid_block_type=None; ours has 'UNetMidBlock2D'"),
  ],
)
def test_other_settings_are_refused(tmp_path, config, settings, message):
  with pytest.raises(ValueError, match=message) as error:
    diffusers_layout.load(folder(tmp_path, config, **settings))
  assert "config.json" in str(error.value) and "\n" not in str(error.value)


def test_settings_that_do_not_matter_or_are_diffusers_defaults_may_differ(tmp_path):
  path = folder(tmp_path, UNET, dropout=0.3, _name_or_path="x", num_train_timesteps=1000)
  settings = json.loads((path / "config.json").read_text())
  del settings["act_fn"], settings["norm_eps"]
  (path / "config.json").write_text(json.dumps(settings))
  assert diffusers_layout.load(path)[1] == UNET


def test_files_that_are_missing_or_cut_off_are_said(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"config\.json"):
    diffusers_layout.load(tmp_path)
  path = folder(tmp_path)
  whole = (path / WEIGHTS).read_bytes()
  (path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match="not a whole safetensors file"):
    diffusers_layout.load(path)
  (path / WEIGHTS).unlink()
  with pytest.raises(FileNotFoundError, match="is not there"):
    diffusers_layout.load(path)
  (path / "config.json").write_text("[1, 2]")
  with pytest.raises(ValueError, match="is not an object in JSON"):
    diffusers_layout.load(path)
