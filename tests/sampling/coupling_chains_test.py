"""Verification of whole chains and trees: the law of the text, and how much of it is accepted."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.sampling import coupling
from ancestral.sampling import logits as logits_lib

BINARY = (
  -1,
  -1,
  0,
  0,
  1,
)  # two drafts of the next token, two after the first, one after the second


def log(p):
  with np.errstate(divide="ignore"):
    return jnp.asarray(np.log(p), jnp.float32)


class Tables(dict):
  """A law [V] for every context, drawn when it is first asked for; about `sparsity` zeros."""

  def __init__(self, seed, vocab_size, sparsity=0.0):
    self.rng, self.size, self.sparsity = np.random.default_rng(seed), vocab_size, sparsity

  def __missing__(self, context):
    law = self.rng.dirichlet(np.full(self.size, 0.8)) * (self.rng.random(self.size) > self.sparsity)
    self[context] = law / law.sum() if law.sum() else np.eye(self.size)[0]
    return self[context]


def path_to(parents, node):
  """The indices from the root to a node, itself included; none for -1."""
  return (*path_to(parents, parents[node]), node) if node >= 0 else ()


def laws(parents, drafts, q, p):
  """The laws that each draft is of [K, V], and the target's [K + 1, V], for one tree of tokens."""
  context = lambda node: tuple(drafts[i] for i in path_to(parents, node))
  return (
    np.array([q[context(parent)] for parent in parents]),
    np.array([p[context(node)] for node in range(-1, len(parents))]),
  )


def every_tree(parents, q, p):
  """All drafts [T, K] of tables q, p, their probabilities [T], and their laws."""
  drafts = np.array(list(itertools.product(range(q.size), repeat=len(parents))))
  draft_laws, target_laws = map(
    np.array, zip(*(laws(parents, row, q, p) for row in drafts), strict=True)
  )
  probability = np.take_along_axis(draft_laws, drafts[..., None], axis=-1)[..., 0].prod(axis=1)
  return drafts, probability, draft_laws, target_laws


def joint(p, length):
  """The law [V] * length of a text."""
  law = np.zeros((p.size,) * length)
  for text in np.ndindex(law.shape):
    law[text] = np.prod([p[text[:i]][text[i]] for i in range(length)])
  return law


compiled = functools.cache(jax.jit)
tree = functools.cache(coupling.tree)
block_rows = jax.jit(jax.vmap(coupling.block_law))
CHAIN = coupling.chain(coupling.maximal_one)


NUM_ROWS = 8000  # fewer are repeated, so that each verifier is compiled once


def verdicts(verify, drafts, draft_laws, target_laws):
  rows = np.arange(NUM_ROWS) % len(drafts)
  keys = jax.random.split(jax.random.key(0), NUM_ROWS)
  drafts = jnp.asarray(np.asarray(drafts)[rows], jnp.int32)
  got = compiled(verify)(keys, drafts, log(draft_laws[rows]), log(target_laws[rows]))
  return jax.tree.map(np.asarray, got)


def text_law(parents, stops, residuals, drafts, probability, p):
  """The law of the accepted drafts, the next token, and what the target writes after them.

  stops, residuals: [T, K + 1] and [T, K + 1, V], the probability to stop at the root or after a
  draft, and the token's law there.
  """
  length = max(len(path_to(parents, i)) for i in range(-1, len(parents))) + 1
  law = np.zeros((p.size,) * length)
  later = {}
  for t, row in enumerate(drafts):
    for node in range(-1, len(parents)):
      text = tuple(row[i] for i in path_to(parents, node))
      for v in range(p.size):
        mass = probability[t] * stops[t, node + 1] * residuals[t, node + 1, v]
        later[(*text, v)] = later.get((*text, v), 0) + mass
  for text, mass in later.items():
    for rest in itertools.product(range(p.size), repeat=length - len(text)):
      whole = text + rest
      law[whole] += mass * np.prod([p[whole[:i]][whole[i]] for i in range(len(text), length)])
  return law


def tree_law(rule, parents, q, p):
  """What `tree(rule, parents)` writes, by its own probabilities and the rule's residuals."""
  drafts, probability, draft_laws, target_laws = every_tree(parents, q, p)
  accept = verdicts(tree(rule, parents), drafts, draft_laws, target_laws).accept_prob
  accept = accept[: len(drafts)].astype(np.float64)
  num_nodes = len(parents) + 1
  children = [
    [i for i, parent in enumerate(parents) if parent == node - 1] for node in range(num_nodes)
  ]
  reach = np.ones((len(drafts), num_nodes))
  for i, parent in enumerate(parents):
    reach[:, i + 1] = reach[:, parent + 1] * accept[:, i]
  stops, residuals = reach.copy(), target_laws.copy()
  for node, some in enumerate(children):
    if some:
      stops[:, node] *= 1 - accept[:, some].sum(axis=1)
      judged = compiled(rule)(
        jnp.asarray(drafts[:, some]), log(draft_laws[:, some[0]]), log(target_laws[:, node])
      )
      residuals[:, node] = targets.softmax(judged.residual)
  expected = (probability[:, None] * reach[:, 1:]).sum()
  return text_law(parents, stops, residuals, drafts, probability, p), expected


def block_text_law(q, p, num_drafts):
  """What `block` writes, by its coins and residuals, and Pr(i or more are accepted) [T, K + 1]."""
  parents = range(-1, num_drafts - 1)
  drafts, probability, draft_laws, target_laws = every_tree(parents, q, p)
  h, residual = block_rows(jnp.asarray(drafts), log(draft_laws), log(target_laws))
  coins = np.hstack([np.ones((len(drafts), 1)), np.asarray(h, np.float64)])
  stops = np.array([[row[i] * np.prod(1 - row[i + 1 :]) for i in range(row.size)] for row in coins])
  at_least = np.cumsum(stops[:, ::-1], axis=1)[:, ::-1]
  law = text_law(parents, stops, targets.softmax(residual), drafts, probability, p)
  return law, (probability[:, None] * at_least[:, 1:]).sum(), at_least


@pytest.mark.parametrize("sparsity", [0.0, 0.4])
def test_a_block_writes_the_target_s_text_and_accepts_no_less_than_a_chain(sparsity):
  chains, blocks = [], []
  for seed in range(6):
    q, p = Tables(seed, 3, sparsity), Tables(seed + 100, 3, sparsity)
    for found, (law, expected) in (
      (chains, tree_law(coupling.maximal_one, (-1, 0, 1), q, p)),
      (blocks, block_text_law(q, p, 3)[:2]),
    ):
      np.testing.assert_allclose(law, joint(p, 4), atol=1e-6)
      found.append(expected)
  gain = np.array(blocks) - np.array(chains)
  assert gain.min() > -1e-6 and gain.max() > 0.01


def test_a_block_reports_the_probabilities_of_its_coins():
  q, p = Tables(0, 3), Tables(1, 3)
  drafts, _, draft_laws, target_laws = every_tree(range(-1, 2), q, p)
  accept = verdicts(coupling.block, drafts, draft_laws, target_laws).accept_prob[: len(drafts)]
  _, _, at_least = block_text_law(q, p, 3)
  np.testing.assert_allclose(np.cumprod(accept, axis=1), at_least[:, 1:], atol=1e-6)


def test_the_example_of_the_block_verification_paper():
  # Sun et al. 2024, arXiv 2403.10444: p = (1/3, 2/3), q = (2/3, 1/3), two drafts. A chain of
  # maximal couplings accepts 2/3 + 4/9 = 10/9 of them, a block 11/9.
  q, p = Tables(0, 2), Tables(0, 2)
  for context in ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)):
    q[context], p[context] = np.array([2, 1]) / 3, np.array([1, 2]) / 3
  np.testing.assert_allclose(block_text_law(q, p, 2)[1], 11 / 9, atol=1e-6)


@pytest.mark.parametrize("sparsity", [0.0, 0.4])
@pytest.mark.parametrize("rule", [coupling.k_sequential, coupling.sample_and_match])
def test_a_tree_writes_the_target_s_text(rule, sparsity):
  q, p = Tables(1, 3, sparsity), Tables(2, 3, sparsity)
  law, _ = tree_law(rule, BINARY, q, p)
  np.testing.assert_allclose(law, joint(p, 3), atol=1e-6)


def drawn_tree(rng, parents, q, replacement):
  drafts = np.zeros(len(parents), np.int32)
  for i, parent in enumerate(parents):
    law = q[tuple(drafts[j] for j in path_to(parents, parent))].copy()
    if not replacement:
      law[[drafts[j] for j in range(i) if parents[j] == parent]] = 0
    drafts[i] = rng.choice(q.size, p=law / law.sum())
  return drafts


@pytest.mark.parametrize(
  "verify, parents, replacement",
  [
    (CHAIN, (-1, 0, 1), True),
    (coupling.block, (-1, 0, 1), True),
    (tree(coupling.k_sequential, BINARY), BINARY, True),
    (tree(coupling.recursive_rejection_without_replacement, BINARY), BINARY, False),
  ],
  ids=["chain", "block", "tree", "tree without replacement"],
)
def test_the_text_that_is_drawn_has_the_law_of_the_target(verify, parents, replacement):
  num_draws, rng = NUM_ROWS, np.random.default_rng(3)
  q, p = Tables(4, 3), Tables(5, 3)
  drafts = np.stack([drawn_tree(rng, parents, q, replacement) for _ in range(num_draws)])
  every = {row: laws(parents, row, q, p) for row in map(tuple, np.unique(drafts, axis=0))}
  given = zip(*(every[tuple(row)] for row in drafts), strict=True)
  got = verdicts(verify, drafts, *map(np.array, given))
  texts = []
  for row, token, path in zip(drafts, got.token, got.path, strict=True):
    text = [*row[path[path >= 0]], token]
    while len(text) <= got.path.shape[1]:
      text.append(rng.choice(p.size, p=p[tuple(text)]))
    texts.append(text)
  targets.check_law(np.array(texts), joint(p, got.path.shape[1] + 1))
  # The reported probabilities are those of what happened, and the path is one of the tree.
  reach = np.ones((num_draws, len(parents) + 1))
  for i, parent in enumerate(parents):
    reach[:, i + 1] = reach[:, parent + 1] * got.accept_prob[:, i]
  error = 4 * len(parents) / num_draws**0.5
  assert abs(reach[:, 1:].sum(axis=1).mean() - got.num_accepted.mean()) < error
  np.testing.assert_array_equal((got.path >= 0).sum(axis=1), got.num_accepted)
  ends = {(-1,) * got.path.shape[1]} | {
    (*path_to(parents, i), *(-1,) * got.path.shape[1])[: got.path.shape[1]]
    for i in range(len(parents))
  }
  assert set(map(tuple, got.path)) == ends


VERIFIERS = {"chain": CHAIN, "block": coupling.block}


@pytest.mark.parametrize("name", VERIFIERS)
def test_an_equal_draft_is_accepted_whole(name):
  rng = np.random.default_rng(6)
  p = rng.dirichlet(np.full(3, 0.3), size=(NUM_ROWS, 4))
  p[:500, :, 1] = 0
  p /= p.sum(axis=-1, keepdims=True)
  drafts = [[rng.choice(3, p=law) for law in row[:3]] for row in p]
  got = verdicts(VERIFIERS[name], drafts, p[:, :3], p)
  np.testing.assert_array_equal(got.accept_prob, 1)
  np.testing.assert_array_equal(got.num_accepted, 3)


@pytest.mark.parametrize("name", VERIFIERS)
def test_at_temperature_zero_a_draft_is_accepted_if_it_is_the_likeliest_token(name):
  rng = np.random.default_rng(8)
  logits = jnp.asarray(rng.normal(size=(NUM_ROWS * 4, 3)), jnp.float32)
  greedy = logits_lib.temperature(0.0).apply(logits, None, ()).reshape(NUM_ROWS, 4, 3)
  best = np.asarray(logits).reshape(NUM_ROWS, 4, 3).argmax(axis=-1)
  drafts = np.where(
    rng.random((NUM_ROWS, 3)) < 0.7, best[:, :3], rng.integers(3, size=(NUM_ROWS, 3))
  )
  got = verdicts(VERIFIERS[name], drafts, np.full((NUM_ROWS, 3, 3), 1 / 3), targets.softmax(greedy))
  want = np.cumprod(drafts == best[:, :3], axis=1).sum(axis=1)
  np.testing.assert_array_equal(got.num_accepted, want)
  np.testing.assert_array_equal(got.token, best[np.arange(NUM_ROWS), want])


@pytest.mark.parametrize("name", VERIFIERS)
def test_disjoint_laws_accept_nothing_and_give_the_target(name):
  p = np.tile([0.0, 0.25, 0.75], (NUM_ROWS, 4, 1))
  got = verdicts(
    VERIFIERS[name], np.zeros((NUM_ROWS, 3)), np.tile([1.0, 0, 0], (NUM_ROWS, 3, 1)), p
  )
  assert (got.num_accepted == 0).all() and (got.accept_prob == 0).all()
  targets.check_law(got.token[:, None], p[0, 0])


@pytest.mark.parametrize("name", VERIFIERS)
def test_a_row_padded_with_no_law_is_a_shorter_chain(name):
  rng = np.random.default_rng(7)
  q, p = rng.dirichlet(np.ones(3), size=(2, 4))
  q, p = (np.tile(law, (NUM_ROWS, 1, 1)) for law in (q[:3], p))
  drafts = np.stack([rng.choice(3, NUM_ROWS, p=law) for law in q[0]], axis=1)
  padded = q * np.array([1, 1, 0])[:, None]
  got = verdicts(VERIFIERS[name], drafts, padded, p)
  # What a block makes of a draft depends on those after it; a chain's judgement does not.
  short = slice(2 if name == "block" else 3)
  want = verdicts(VERIFIERS[name], drafts[:, short], q[:, short], p[:, : short.stop + 1])
  np.testing.assert_allclose(got.accept_prob[:, :2], want.accept_prob[:, :2], atol=1e-6)
  np.testing.assert_array_equal(got.accept_prob[:, 2], 0)
  assert got.num_accepted.max() == 2
  targets.check_law(got.token[got.num_accepted == 2][:, None], p[0, 2])


def test_no_drafts_at_all_draw_from_the_target():
  p = np.tile([0.5, 0.3, 0.2], (NUM_ROWS, 1, 1))
  for verify in (coupling.block, CHAIN):
    got = verdicts(verify, np.zeros((NUM_ROWS, 0)), np.zeros((NUM_ROWS, 0, 3)), p)
    assert (got.num_accepted == 0).all() and got.path.shape == (NUM_ROWS, 0)
    targets.check_law(got.token[:, None], p[0, 0])


def test_a_tree_with_a_child_before_its_parent_is_refused():
  with pytest.raises(ValueError, match="draft 1 continues 2; parents come first"):
    coupling.tree(coupling.k_sequential, (-1, 2, 0))
