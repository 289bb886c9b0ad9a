"""Exact laws of ancestral unmasking, by hand and at their limits."""

import itertools

import numpy as np

from ancestral.evaluation import unmasking_laws

JOINT = np.random.default_rng(0).dirichlet(np.full(27, 0.5)).reshape(3, 3, 3)


def test_conditionals_are_bayes_rule():
  for given in ((), (1,), (0, 2)):
    found = unmasking_laws.conditionals(JOINT, given)
    assert sorted(found) == [i for i in range(3) if i not in given]
    for x in itertools.product(range(3), repeat=3):
      agree = lambda places, x=x: sum(
        JOINT[y] for y in itertools.product(range(3), repeat=3) if all(y[j] == x[j] for j in places)
      )
      for i, law in found.items():
        value = np.broadcast_to(law, JOINT.shape)[x]
        np.testing.assert_allclose(value, agree((*given, i)) / agree(given))


def test_one_step_is_the_product_of_marginals():
  marginals = [JOINT.sum(axis=tuple(j for j in range(3) if j != i)) for i in range(3)]
  expected = np.einsum("a,b,c->abc", *marginals)
  np.testing.assert_allclose(unmasking_laws.ancestral_law(JOINT, [1.0]), expected)


def test_two_steps_of_two_tokens_by_hand():
  joint = np.array([[0.5, 0.1], [0.1, 0.3]])
  product = np.outer(joint.sum(axis=1), joint.sum(axis=0))
  # Both in one step, with probability 1/4 in each of the two, or one after the other.
  np.testing.assert_allclose(unmasking_laws.ancestral_law(joint, [0.5, 1.0]), (product + joint) / 2)


def test_short_steps_tend_to_the_law():
  errors = []
  for steps in (8, 16, 32, 64):
    law = unmasking_laws.ancestral_law(JOINT, 1 / np.arange(steps, 0, -1))
    np.testing.assert_allclose(law.sum(), 1)
    errors.append(np.abs(law - JOINT).sum())
  np.testing.assert_allclose(np.array(errors[:-1]) / errors[1:], 2, atol=0.2)


def test_what_is_impossible_stays_so():
  joint = np.array([[0.5, 0.0], [0.0, 0.5]])
  law = unmasking_laws.ancestral_law(joint, [0.5, 1.0])
  np.testing.assert_allclose(law, [[0.375, 0.125], [0.125, 0.375]])
