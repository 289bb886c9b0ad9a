"""A model that leaves early: against its layers applied by hand, and as a drafter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import early_exit, transformer
from ancestral.sampling import decode, drafting, logits, speculative

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 23, (3, 9)), jnp.int32)
ROWS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5], [8, 9, 7, 9], [3, 2]]
CONFIG = targets.tiny_config(num_layers=3)


def target():
  return targets.tiny_target(num_layers=3)


@pytest.mark.parametrize("layout", [transformer.stack, transformer.unstack])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_it_is_the_model_without_its_last_layers(num_layers, layout):
  model, params = target()
  shallow = targets.tiny_config(num_layers=num_layers)
  first = transformer.unstack(params)["layers"][:num_layers]
  expected, _ = targets.apply(transformer.transformer(shallow), {**params, "layers": first}, TOKENS)
  leaving = early_exit.early_exit(CONFIG, num_layers)
  found, _ = targets.apply(leaving, layout(params), TOKENS)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  whole, _ = targets.apply(model, params, TOKENS)
  apart = np.abs(found - whole).max()
  assert apart < 1e-5 if num_layers == 3 else apart > 0.1


@pytest.mark.slow
def test_its_params_are_the_whole_models_and_its_cache_is_shallow():
  _, params = target()
  leaving = early_exit.early_exit(CONFIG, 2)
  assert jax.tree.structure(leaving.init(jax.random.key(0), TOKENS)) == jax.tree.structure(params)
  cache = leaving.init_cache(params, 3, 9)
  assert len(cache.layers) == 2
  unstacked = transformer.unstack(params)
  _, cache = targets.apply(leaving, unstacked, TOKENS[:, :4], cache)
  found, cache = targets.apply(leaving, unstacked, TOKENS[:, 4:], cache)
  expected, _ = targets.apply(leaving, params, TOKENS)
  assert len(cache.layers) == 2 and np.all(cache.length == 9)
  np.testing.assert_allclose(found, expected[:, 4:], atol=1e-4)


@pytest.mark.parametrize("num_layers", [0, -1, 4])
def test_an_exit_is_after_a_layer_that_there_is(num_layers):
  with pytest.raises(ValueError, match=f"after {num_layers} layers of 3"):
    early_exit.early_exit(CONFIG, num_layers)


GREEDY = {"max_new_tokens": 12, "transform": logits.greedy(), "stop": (7,)}


@pytest.mark.slow
def test_greedy_is_greedy_token_for_token():
  model, params = targets.tiny_target(scan_layers=False)
  keys, prompts = targets.keys_of(np.arange(5)), targets.prompts_of(ROWS)
  plain = jax.jit(
    lambda params, keys, prompts: decode.generate(model, params, keys, prompts, **GREEDY)
  )(params, keys, prompts)
  drawn = np.asarray(plain.length - plain.prompt_length)
  for num_layers in (1, 2):
    leaving = early_exit.early_exit(targets.tiny_config(), num_layers)

    def sample(params, keys, prompts, leaving=leaving):
      drafter = drafting.by_model(leaving, params, num_drafts=3, transform=logits.greedy())
      return speculative.generate(model, params, drafter, keys, prompts, **GREEDY)

    samples = jax.jit(sample)(params, keys, prompts)
    for name in ("tokens", "length", "prompt_length"):
      np.testing.assert_array_equal(getattr(samples, name), getattr(plain, name), err_msg=name)
    if num_layers == 2:  # after all layers every draft stands: four tokens a call
      np.testing.assert_array_equal(samples.num_calls, -(-drawn // 4))
      np.testing.assert_array_equal(samples.num_accepted, samples.num_drafted)
    else:
      assert np.any(samples.num_accepted < samples.num_drafted)
