"""Our diffusion networks compute what diffusers' models compute with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.models import base, diffusers_layout, dit, unet

pytestmark = pytest.mark.peers


def randomised(params, key):
  """Params whose zeros (of gates, last layers) are numbers too."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(key, len(leaves))
  noisy = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  return jax.tree.unflatten(tree, noisy)


def torch_model(kind, settings, state):
  import diffusers
  import torch

  model = getattr(diffusers, kind)(**settings).eval()
  tensors = {name: torch.tensor(np.array(value)) for name, value in state.items()}
  missing, unexpected = model.load_state_dict(tensors, strict=False)
  assert not unexpected
  assert all(name.startswith("pos_embed.pos_embed") for name in missing), missing
  return model


def compare(network, params, model, shape, num_classes):
  import torch

  x = jax.random.normal(jax.random.key(1), (3, *shape))
  level, label = jnp.array([0.3, 17.25, 999.0]), jnp.array([0, 2, num_classes])
  with jax.default_matmul_precision("highest"):
    ours = np.asarray(network.apply(params, x, level, base.Condition(label)))
  with torch.no_grad():
    theirs = model(
      torch.tensor(np.array(x).transpose(0, 3, 1, 2)),
      torch.tensor(np.array(level)),
      class_labels=torch.tensor(np.array(label)).long(),
    ).sample
  theirs = theirs.numpy().transpose(0, 2, 3, 1)
  assert np.std(ours) > 0.05
  np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("size, patch", [(8, 2), (12, 4)])
def test_dit(size, patch):
  config = dit.DiTConfig(
    image_shape=(size, size, 3),
    patch_size=patch,
    num_layers=3,
    width=64,
    num_heads=4,
    num_classes=5,
  )
  network = dit.dit(config)
  params = network.init(jax.random.key(0), jnp.zeros((1, size, size, 3)))
  params = randomised(params, jax.random.key(2))
  state = diffusers_layout.dit_to_diffusers(params, config)
  model = torch_model("DiTTransformer2DModel", diffusers_layout.dit_settings(config), state)
  compare(network, params, model, (size, size, 3), 5)


@pytest.mark.parametrize(
  "multipliers, attention, num_blocks", [((1, 2), (1,), 2), ((1, 2, 2), (1, 2), 1), ((1,), (), 1)]
)
def test_unet(multipliers, attention, num_blocks):
  config = unet.UNetConfig(
    image_shape=(8, 8, 1),
    channels=32,
    multipliers=multipliers,
    attention=attention,
    num_blocks=num_blocks,
    head_dim=16,
    num_classes=5,
  )
  network = unet.unet(config)
  params = network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
  params = randomised(params, jax.random.key(2))
  state = diffusers_layout.unet_to_diffusers(params, config)
  model = torch_model("UNet2DModel", diffusers_layout.unet_settings(config), state)
  compare(network, params, model, (8, 8, 1), 5)
