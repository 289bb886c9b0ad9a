"""Fillings as responses: what they are read as, and that batches do not matter."""

import jax
import jax.numpy as jnp
import numpy as np

from ancestral.evaluation import fillings
from ancestral.tasks import tokenizer

CODE = tokenizer.characters("abc")
MASK = CODE.vocab_size


def drawing(batches):
  """Fills masks with letters that the row's key decides on; records the shapes of its batches."""

  @jax.jit
  def fill(keys, tokens):
    letters = jnp.array(CODE.encode("abc"))
    drawn = jax.vmap(lambda key: jax.random.randint(key, tokens.shape[1:], 0, 3))(keys)
    masked = tokens == MASK
    return fillings.Filled(
      jnp.where(masked, letters[drawn], tokens), jnp.sum(masked, axis=1, dtype=jnp.int32)
    )

  def recorded(keys, tokens):
    batches.append(tokens.shape)
    return fill(keys, tokens)

  return recorded


QUERIES = [
  fillings.Query(np.array([CODE.bos, MASK, MASK, MASK], np.int32), 1),
  fillings.Query(np.array([CODE.bos, *CODE.encode("a"), MASK, CODE.eos], np.int32), 1),
  fillings.Query(np.array([CODE.bos, *CODE.encode("ab"), MASK], np.int32), 3),
]


def test_fillings_do_not_depend_on_the_batch():
  found = []
  for size in (1, 2, 5, 6):
    shapes = []
    filled = fillings.fill_all(
      drawing(shapes), QUERIES, jax.random.key(0), num_samples=2, batch_size=size
    )
    assert set(shapes) == {(size, 4)}
    assert filled.tokens.shape == (6, 4)
    np.testing.assert_array_equal(filled.calls, [3, 3, 1, 1, 1, 1])
    found.append(filled.tokens)
  for other in found[1:]:
    np.testing.assert_array_equal(other, found[0])
  assert np.any(found[0][0] != found[0][1])  # samples of one query differ


def test_a_response_begins_at_its_start_and_ends_with_the_end():
  a, b, c = CODE.encode("abc")
  read = lambda tokens, start: fillings.response(CODE, np.array(tokens), start)
  assert read([CODE.bos, a, b, CODE.eos, c, c], 1)[:2] == ("ab", "")
  assert read([CODE.bos, a, b, CODE.eos], 2).text == "b"
  assert "did not end" in read([CODE.bos, a, b, c], 1).fault
  assert "padding" in read([CODE.bos, a, CODE.pad, CODE.eos], 1).fault
  assert read([CODE.bos, CODE.eos, a, a], 1)[:2] == ("", "")


def test_responses_are_grouped_by_query():
  fill = drawing([])
  made = fillings.respond(fill, CODE, QUERIES, jax.random.key(0), num_samples=3, batch_size=4)
  assert [len(group) for group in made] == [3, 3, 3]
  assert all(response.text.startswith("a") and not response.fault for response in made[1])
  assert all(len(response.text) == 1 for response in made[2])
