"""Parity with transformers: one architecture, the same weights, the same numbers."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import pretrained, transformer
from ancestral.sampling import base as sampling
from ancestral.sampling import decode, logits

VARIANTS = {
  "multi_head": {"num_kv_heads": 4},
  "grouped": {"rotary_base": 500.0},
  "bias": {"use_bias": True},
  "untied": {"tied_embeddings": False},
  "wide_heads": {"head_dim": 12, "mlp_width": 40, "norm_epsilon": 1e-3},
}


@pytest.fixture(scope="module")
def peers():
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what torch and transformers import
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers import LlamaForCausalLM  # noqa: F401  (imported lazily)
  return torch, transformers


def llama(peers, config, params):
  torch, transformers = peers
  theirs = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      **pretrained.llama_config(config), bos_token_id=None, eos_token_id=None, pad_token_id=0
    )
  )
  state = {
    name: torch.from_numpy(value) for name, value in pretrained.llama_state_dict(params).items()
  }
  theirs.load_state_dict(state, strict=True)
  return theirs.eval()


@pytest.mark.peers
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_llamas(peers, name):
  torch, _ = peers
  model, params = targets.tiny_target(**VARIANTS[name])
  theirs = llama(peers, targets.tiny_config(**VARIANTS[name]), params)
  tokens = np.random.default_rng(0).integers(0, 23, (3, 20))
  with torch.inference_mode():
    expected = theirs(torch.from_numpy(tokens)).logits.numpy()
  with jax.default_matmul_precision("highest"):
    hidden, _ = targets.apply(model, params, jnp.asarray(tokens))
    out = model.readout(params, hidden)
  assert expected.std() > 0.5
  assert np.abs(out - expected).max() < 1e-4


@pytest.mark.peers
@pytest.mark.parametrize("name", ["grouped", "bias"])
def test_greedy_decoding_equals_llamas_token_for_token(peers, name):
  torch, _ = peers
  model, params = targets.tiny_target(**VARIANTS[name])
  theirs = llama(peers, targets.tiny_config(**VARIANTS[name]), params)
  rng = np.random.default_rng(1)
  rows = [rng.integers(1, 23, length).tolist() for length in (3, 8, 1, 6)]
  padded = np.array([[0] * (8 - len(row)) + row for row in rows])  # generate needs the left
  attention = np.array([[0] * (8 - len(row)) + [1] * len(row) for row in rows])
  with torch.inference_mode():
    expected = theirs.generate(
      torch.from_numpy(padded),
      attention_mask=torch.from_numpy(attention),
      do_sample=False,
      max_new_tokens=16,
      min_new_tokens=16,
    ).numpy()[:, 8:]
  prompts = decode.pad_prompts(rows, vocab_size=23, max_length=32, max_new_tokens=16)
  keys = sampling.row_keys(jax.random.key(0), jnp.arange(4))
  samples = jax.jit(
    lambda params, keys, prompts: decode.generate(
      model, params, keys, prompts, max_new_tokens=16, transform=logits.greedy()
    )
  )(transformer.unstack(params), keys, prompts)
  for b, row in enumerate(rows):
    np.testing.assert_array_equal(samples.tokens[b, len(row) : len(row) + 16], expected[b])
  assert len(np.unique(expected)) > 4  # not one token over and over


@pytest.mark.peers
def test_exported_names_are_all_of_llamas(peers):
  _, params = targets.tiny_target(use_bias=True)
  theirs = llama(peers, targets.tiny_config(use_bias=True), params)
  state = pretrained.llama_state_dict(transformer.unstack(params))
  assert set(state) == set(theirs.state_dict())


@pytest.mark.parametrize(
  "fields, culprit",
  [
    ({"positions": "learned"}, "positions"),
    ({"causal": False}, "causal"),
    ({"window": 4}, "window"),
    ({"qk_norm": True}, "qk_norm"),
    ({"logit_softcap": 5.0}, "logit_softcap"),
    ({"position_range": 64}, "position_range"),
  ],
)
def test_what_llama_has_not_is_named(fields, culprit):
  with pytest.raises(ValueError, match=f"no counterpart of {culprit} as configured"):
    pretrained.llama_config(targets.tiny_config(**fields))


def test_export_takes_either_layout():
  _, params = targets.tiny_target()
  stacked, loose = (pretrained.llama_state_dict(p) for p in (params, transformer.unstack(params)))
  assert stacked.keys() == loose.keys()
  for name, value in stacked.items():
    np.testing.assert_array_equal(value, loose[name])
