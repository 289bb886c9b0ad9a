"""Beam search against transformers', on a llama of the same weights."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import pretrained, transformer
from ancestral.sampling import base, beam, decode


@pytest.fixture(scope="module")
def peers():
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what torch and transformers import
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers import LlamaForCausalLM  # noqa: F401  (imported lazily)
  return torch, transformers


@pytest.mark.peers
@pytest.mark.parametrize("width, stop", [(2, (2,)), (4, (2,)), (3, (5, 7, 11)), (4, ())])
def test_beams_equal_transformers(peers, width, stop, tmp_path):
  torch, transformers = peers
  model, params = targets.tiny_target()
  ids = {"pad_token_id": 0}
  pretrained.write(tmp_path / "model", targets.tiny_config(), params, token_ids=ids)
  theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model")
  rows, room = [(3, 1, 4), (9,), (5, 9, 2, 6, 5), (8, 8)], 9
  padded = torch.tensor([[0] * (5 - len(prompt)) + list(prompt) for prompt in rows])
  attended = torch.tensor([[0] * (5 - len(prompt)) + [1] * len(prompt) for prompt in rows])
  tokens = np.array([[*prompt, *[0] * (5 - len(prompt))] for prompt in rows], np.int32)
  prompts = decode.Prompts(jnp.asarray(tokens), jnp.array([len(prompt) for prompt in rows]))
  keys = base.row_keys(jax.random.key(0), jnp.arange(4))

  @jax.jit
  def run(params, penalty):
    algorithm = beam.beam_search(
      model,
      params,
      num_beams=width,
      max_length=14,
      max_new_tokens=room,
      stop=stop,
      length_penalty=penalty,
    )
    return beam.search(keys, algorithm, prompts)

  for penalty in (0.0, 1.0, 2.0, -0.5):
    with torch.inference_mode():
      expected = theirs.eval().generate(
        padded,
        attention_mask=attended,
        num_beams=width,
        num_return_sequences=width,
        eos_token_id=list(stop) or None,
        early_stopping="never",
        length_penalty=penalty,
        do_sample=False,
        max_new_tokens=room,
        return_dict_in_generate=True,
        output_scores=True,
      )
    with jax.default_matmul_precision("highest"):
      beams = jax.tree.map(np.asarray, run(transformer.unstack(params), jnp.float32(penalty)))
    sequences = expected.sequences.numpy()[:, 5:].reshape(4, width, -1)
    scores = expected.sequences_scores.numpy().reshape(4, width)
    np.testing.assert_allclose(beams.score, scores, atol=1e-4)
    for b, prompt in enumerate(rows):
      for k in range(width):
        new = beams.tokens[b, k, len(prompt) : beams.length[b, k]]
        np.testing.assert_array_equal(sequences[b, k, : len(new)], new)
