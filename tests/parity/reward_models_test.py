"""Losses of reward models against OpenRLHF's and TRL's, and where theirs overflow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.training import reward_models
from parity import extracted

pytestmark = pytest.mark.peers

RNG = np.random.default_rng(0)
CHOSEN, REJECTED, MARGIN = (RNG.normal(scale=4, size=50).astype(np.float32) for _ in range(3))


@pytest.fixture(scope="module")
def torch(peers):
  return peers[0]


@pytest.fixture(scope="module")
def openrlhf(torch):
  given = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional}
  names = ["PairWiseLoss", "LogExpLoss"]
  return extracted.functions("openrlhf", "0.11.2", "openrlhf/models/loss.py", names, given)


def theirs(torch, loss, *scores):
  tensors = [torch.tensor(score, requires_grad=True) for score in scores]
  value = loss(*tensors)
  value.backward()
  return value.item(), [tensor.grad.numpy() for tensor in tensors]


def ours(loss, *scores):
  value, gradients = jax.value_and_grad(
    lambda *scores: loss(*scores).mean(), argnums=tuple(range(len(scores)))
  )(*map(jnp.asarray, scores))
  return float(value), gradients


def agree(a, b):
  np.testing.assert_allclose(a[0], b[0], rtol=1e-5)
  for x, y in zip(a[1], b[1], strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-8)


def test_pairwise_loss_with_and_without_a_margin(torch, openrlhf):
  agree(
    ours(reward_models.bradley_terry, CHOSEN, REJECTED),
    theirs(torch, openrlhf.PairWiseLoss(), CHOSEN, REJECTED),
  )
  with_margin = lambda chosen, rejected, margin: reward_models.bradley_terry(
    chosen, rejected, margin=margin
  )
  agree(
    ours(with_margin, CHOSEN, REJECTED, MARGIN),
    theirs(torch, openrlhf.PairWiseLoss(), CHOSEN, REJECTED, MARGIN),
  )


def test_the_other_pairwise_loss_agrees_until_it_overflows(torch, openrlhf):
  loss = openrlhf.LogExpLoss()
  agree(ours(reward_models.bradley_terry, CHOSEN, REJECTED), theirs(torch, loss, CHOSEN, REJECTED))
  behind = np.full(1, -100, np.float32), np.zeros(1, np.float32)
  value, (gradient, _) = theirs(torch, loss, *behind)
  assert np.isinf(value) and np.isnan(gradient[0])  # log(1 + exp(100)) in float32
  value, (gradient, _) = ours(reward_models.bradley_terry, *behind)
  assert value == 100 and gradient[0] == -1


def test_steps_are_the_token_classification_of_trl(torch):
  # Its PRMTrainer is a classifier of two classes a token, labels -100 off the ends of steps, and
  # the mean over labelled tokens: the score is the difference of the two logits.
  logits = RNG.normal(scale=3, size=(4, 9, 2)).astype(np.float32)
  label = RNG.integers(0, 2, (4, 9))
  ends = RNG.random((4, 9)) < 0.4
  tensor = torch.tensor(logits, requires_grad=True)
  marked = torch.tensor(np.where(ends, label, -100))
  value = torch.nn.functional.cross_entropy(tensor.reshape(-1, 2), marked.reshape(-1))
  value.backward()

  def loss(logits):
    score = logits[..., 1] - logits[..., 0]
    return reward_models.step_level(score, jnp.asarray(label), jnp.asarray(ends)).sum() / ends.sum()

  found, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
  np.testing.assert_allclose(found, value.item(), rtol=1e-5)
  np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=2e-5, atol=1e-8)
