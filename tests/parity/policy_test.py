"""Losses of the policy gradient against verl, OpenRLHF and TRL: values and gradients."""

import functools
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.training import advantages, aggregation, importance, kl, policy
from parity import extracted

pytestmark = pytest.mark.peers

B, T, G = 6, 7, 3
RNG = np.random.default_rng(0)
OLD = np.float32(RNG.uniform(-5, -0.05, (B, T)))
LOG_PROB = np.float32(OLD + RNG.normal(0, 0.6, (B, T)))
REFERENCE = np.float32(LOG_PROB + RNG.normal(0, 0.8, (B, T)))
ROW_ADVANTAGE = np.float32([1.5, -0.7, 0.3, -2.0, 0.9, -0.1])[:, None] * np.ones((1, T), np.float32)
TOKEN_ADVANTAGE = np.float32(RNG.normal(size=(B, T)))
LENGTHS = np.array([7, 2, 5, 1, 6, 4])
MASK = np.float32(np.arange(T) < LENGTHS[:, None])
PROMPTS = np.repeat(np.arange(B // G), G)
REWARDS = np.float32([0.2, 1.0, 0.7, -1.0, 0.0, 3.0])


class ActorConfig(SimpleNamespace):
  """What verl's losses read."""

  def get(self, name, default=None):
    return getattr(self, name, default)


@pytest.fixture(scope="module")
def torch():
  return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def verl(torch):
  given = {"torch": torch, "np": np, "defaultdict": defaultdict}
  names = ["masked_sum", "masked_mean", "masked_var", "masked_whiten"]
  maths = extracted.functions("verl", "0.9.1", "verl/utils/torch_functional.py", names, given)
  losses = ("vanilla", "gspo", "sapo", "geo_mean", "cispo", "dro")
  names = ["agg_loss", "kl_penalty", "kl_penalty_forward", "compute_policy_loss_reinforce"]
  names += [f"compute_policy_loss_{name}" for name in losses]
  outcomes = ("grpo", "grpo_passk", "rloo", "opo", "reinforce_plus_plus", "remax")
  names += [f"compute_{name}_outcome_advantage" for name in outcomes]
  names += ["compute_gae_advantage_return"]
  given |= {"verl_F": maths, "ActorConfig": ActorConfig, "AlgoConfig": type("AlgoConfig", (), {})}
  return extracted.functions("verl", "0.9.1", "verl/trainer/ppo/core_algos.py", names, given)


def config(**fields):
  known = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": None}
  return ActorConfig(**{**known, "global_batch_info": {}, **fields})


def reduced(aggregate, losses, mask=MASK):
  loss, weight = aggregate(losses, jnp.asarray(mask))
  return jnp.sum(loss) / jnp.sum(weight)


def compare(ours, theirs, torch, *, rtol=2e-5):
  """Of functions of the log-probabilities: value, and gradient, which is not 0."""
  value, gradient = jax.value_and_grad(ours)(jnp.asarray(LOG_PROB))
  x = torch.tensor(LOG_PROB, requires_grad=True)
  expected = theirs(x)
  expected.backward()
  np.testing.assert_allclose(value, expected.item(), rtol=rtol)
  np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=rtol, atol=1e-6)
  assert np.abs(gradient).max() > 1e-3


VERL = [
  ("reinforce", policy.reinforce, {}, TOKEN_ADVANTAGE),
  ("vanilla", functools.partial(policy.dual_clip, high=0.28), {"clip_ratio_high": 0.28}, None),
  ("vanilla", functools.partial(policy.dual_clip, most=1.3), {"clip_ratio_c": 1.3}, None),
  ("vanilla", policy.ppo_clip, {"clip_ratio_c": 1e6}, TOKEN_ADVANTAGE),
  ("gspo", functools.partial(policy.gspo_token, low=0.1, high=0.05), None, TOKEN_ADVANTAGE),
  ("gspo", functools.partial(policy.gspo, low=0.1, high=0.05), None, ROW_ADVANTAGE),
  ("cispo", functools.partial(policy.cispo, least=0.8, most=1.28), {"clip_ratio_high": 0.28}, None),
  ("sapo", policy.sapo, {"tau_pos": 1.0, "tau_neg": 1.05}, TOKEN_ADVANTAGE),
  ("dro", policy.dro, {"policy_loss": SimpleNamespace(dro_beta=0.1)}, TOKEN_ADVANTAGE),
]


@pytest.mark.parametrize("name, surrogate, fields, advantage", VERL)
def test_surrogates_are_verls(verl, torch, name, surrogate, fields, advantage):
  fields = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.05} if fields is None else fields
  advantage = ROW_ADVANTAGE if advantage is None else advantage
  loss = getattr(verl, f"compute_policy_loss_{name}")
  mean, mode = aggregation.sequence_mean, "seq-mean-token-mean"  # SAPO's only one
  compare(
    lambda x: reduced(mean, surrogate(x, OLD, advantage, MASK)),
    lambda x: loss(
      torch.tensor(OLD), x, torch.tensor(advantage), torch.tensor(MASK), mode, config(**fields)
    )[0],
    torch,
  )


def test_gmpo_is_verls(verl, torch):
  wide = config(clip_ratio_low=0.4, clip_ratio_high=0.4)
  compare(
    lambda x: reduced(aggregation.sequence_mean, policy.gmpo(x, OLD, ROW_ADVANTAGE, MASK)),
    lambda x: verl.compute_policy_loss_geo_mean(
      torch.tensor(OLD), x, torch.tensor(ROW_ADVANTAGE), torch.tensor(MASK), config=wide
    )[0],
    torch,
  )


AGGREGATIONS = [
  ("token-mean", aggregation.token_mean),
  ("token-mean", aggregation.local_token_mean),
  ("seq-mean-token-mean", aggregation.sequence_mean),
  ("seq-mean-token-sum", aggregation.sequence_sum),
  ("seq-mean-token-sum-norm", functools.partial(aggregation.constant_length, max_length=T)),
]


@pytest.mark.parametrize("mode, aggregate", AGGREGATIONS)
def test_aggregations_are_verls_with_a_row_without_tokens(verl, torch, mode, aggregate):
  mask = MASK * (np.arange(B) != 3)[:, None]
  compare(
    lambda x: reduced(aggregate, jnp.square(x), mask),
    lambda x: verl.agg_loss(x**2, torch.tensor(mask), mode),
    torch,
  )


KL = [
  ("k1", kl.k1),
  ("k2", kl.k2),
  ("k3", kl.k3),
  ("k1+", kl.straight_through(kl.k1, kl.k2)),
  ("k3+", kl.straight_through(kl.k3, kl.k2)),
]


@pytest.mark.parametrize("name, estimator", KL)
def test_kl_estimators_are_verls(verl, torch, name, estimator):
  compare(
    lambda x: reduced(aggregation.token_mean, estimator(x, REFERENCE)),
    lambda x: (
      (verl.kl_penalty(x, torch.tensor(REFERENCE), name) * torch.tensor(MASK)).sum() / MASK.sum()
    ),
    torch,
    rtol=1e-4,  # e^x - 1 - x, theirs, cancels
  )


def test_verls_k3_has_no_gradient_where_the_policy_has_left_the_reference(verl, torch):
  x = torch.tensor([-4.0], requires_grad=True)
  verl.kl_penalty(x, torch.tensor([-1.0]), "k3").sum().backward()
  assert x.grad.item() == 0
  ours = jax.grad(lambda x: kl.k3(x, jnp.array([-1.0])).sum())(jnp.array([-4.0]))
  np.testing.assert_allclose(ours, [1 - np.exp(3)], rtol=1e-5)


def outcome(verl, torch, name, mask=MASK, rewards=REWARDS, **arguments):
  """An advantage of verl's, of rewards on the last token, one a row."""
  tokens = np.zeros((B, T), np.float32)
  tokens[np.arange(B), LENGTHS - 1] = rewards
  function = getattr(verl, f"compute_{name}_outcome_advantage")
  result = function(torch.tensor(tokens), response_mask=torch.tensor(mask), **arguments)[0]
  return result.numpy()


GROUPS = jnp.asarray(REWARDS.reshape(-1, G))
OUTCOMES = [
  ("grpo", {}, functools.partial(advantages.group_normalised, epsilon=1e-6)),
  ("grpo", {"norm_adv_by_std_in_grpo": False}, advantages.group_centred),
  ("rloo", {}, advantages.leave_one_out),
  ("opo", {}, lambda r: advantages.optimal_baseline(r, jnp.asarray(LENGTHS.reshape(-1, G)))),
  (
    "grpo_passk",
    {"config": {"norm_adv_by_std_in_grpo": False}},
    lambda r: advantages.pass_at_k(r, k=G) / G,
  ),
]


@pytest.mark.parametrize("name, arguments, ours", OUTCOMES)
def test_advantages_of_groups_are_verls(verl, torch, name, arguments, ours):
  theirs = outcome(verl, torch, name, index=PROMPTS, **arguments)
  expected = np.asarray(ours(GROUPS)).reshape(-1, 1) * MASK
  np.testing.assert_allclose(theirs, expected, rtol=2e-5, atol=1e-6)


def test_greedy_baseline_is_verls(verl, torch):
  greedy = np.float32([0.5, -0.2])
  theirs = outcome(verl, torch, "remax", reward_baselines=torch.tensor(np.repeat(greedy, G)))
  ours = advantages.greedy_baseline(GROUPS, jnp.asarray(greedy))
  np.testing.assert_allclose(theirs, np.asarray(ours).reshape(-1, 1) * MASK, atol=1e-6)


@pytest.mark.parametrize("mask", [MASK, MASK[:, ::-1].copy(), np.float32(RNG.random((B, T)) < 0.6)])
def test_advantages_of_tokens_are_verls(verl, torch, mask):
  rewards, values = np.float32(RNG.normal(size=(2, B, T)))
  theirs, returns = verl.compute_gae_advantage_return(
    torch.tensor(rewards), torch.tensor(values), torch.tensor(mask), gamma=0.9, lam=0.8
  )
  padded = jnp.pad(values, ((0, 0), (0, 1)))
  ours = advantages.gae(rewards, padded, mask, gamma=0.9, lam=0.8)
  whitened = advantages.batch_whitened(ours, mask)
  np.testing.assert_allclose(whitened, theirs.numpy() * mask, rtol=1e-4, atol=1e-5)
  ours = advantages.lambda_returns(rewards, padded, mask, gamma=0.9, lam=0.8)
  np.testing.assert_allclose(ours, returns.numpy() * mask, rtol=1e-4, atol=1e-5)
  theirs, _ = verl.compute_reinforce_plus_plus_outcome_advantage(
    torch.tensor(rewards), torch.tensor(mask), SimpleNamespace(gamma=0.9)
  )
  ours = advantages.reinforce_plus_plus(rewards, mask, gamma=0.9)
  np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5)


def test_equal_rewards_have_no_advantage_but_in_verl(verl, torch):
  rewards = np.full(B, 0.669, np.float32)  # the mean of three is rounded
  theirs = outcome(verl, torch, "grpo", rewards=rewards, index=PROMPTS)
  assert 0.05 < np.abs(theirs).max()
  assert not np.any(advantages.group_normalised(jnp.asarray(rewards.reshape(-1, G)), epsilon=1e-6))


@pytest.fixture(scope="module")
def openrlhf(torch):
  given = {"torch": torch, "nn": torch.nn}
  mean = extracted.functions(
    "openrlhf", "0.11.2", "openrlhf/models/utils.py", ["masked_mean"], given
  )
  given["masked_mean"] = mean.masked_mean
  names = ["aggregate_loss", "PolicyLoss"]
  return extracted.functions("openrlhf", "0.11.2", "openrlhf/models/loss.py", names, given)


OPENRLHF = [
  ({}, policy.ppo_clip, aggregation.token_mean),
  ({"token_level_loss": False}, policy.ppo_clip, aggregation.sequence_mean),
  ({"dual_clip": 1.5}, functools.partial(policy.dual_clip, most=1.5), aggregation.token_mean),
  (
    {"policy_loss_type": "gspo", "clip_eps_low": 0.1, "clip_eps_high": 0.05},
    functools.partial(policy.gspo, low=0.1, high=0.05),
    aggregation.sequence_mean,
  ),
]


@pytest.mark.parametrize("fields, surrogate, aggregate", OPENRLHF)
def test_surrogates_are_openrlhfs(openrlhf, torch, fields, surrogate, aggregate):
  loss = openrlhf.PolicyLoss(**fields)
  compare(
    lambda x: reduced(aggregate, surrogate(x, OLD, ROW_ADVANTAGE, MASK)),
    lambda x: loss(x, torch.tensor(OLD), torch.tensor(ROW_ADVANTAGE), torch.tensor(MASK))[0],
    torch,
  )


CORRECTIONS = [
  (("token", "mask", [0.5, 1.5]), functools.partial(importance.masked_tokens, low=0.5, high=1.5)),
  (("token", "clip", [0.0, 1.5]), functools.partial(importance.truncated_tokens, cap=1.5)),
]


@pytest.mark.parametrize("how, weigh", CORRECTIONS)
def test_corrections_of_the_sampler_are_openrlhfs(openrlhf, torch, how, weigh):
  level, mode, threshold = how
  loss = openrlhf.PolicyLoss(
    is_correction_level=level, is_correction_mode=mode, is_correction_threshold=threshold
  )
  weight = weigh(jnp.asarray(OLD - REFERENCE), MASK)
  assert 0 < np.sum(np.asarray(weight) != np.exp(OLD - REFERENCE) * MASK)
  theirs = functools.partial(loss, rollout_log_probs=torch.tensor(REFERENCE))
  compare(
    lambda x: reduced(
      aggregation.token_mean, weight * policy.ppo_clip(x, OLD, ROW_ADVANTAGE, MASK)
    ),
    lambda x: theirs(x, torch.tensor(OLD), torch.tensor(ROW_ADVANTAGE), torch.tensor(MASK))[0],
    torch,
  )


def trl_loss(torch, x, path="trl/trainer/grpo_trainer.py", **fields):
  """TRL's loss of log-probabilities that are given to it."""
  given = {"torch": torch, "nanmin": torch.min, "nanmax": torch.max}
  compute = extracted.functions("trl", "0.24.0", path, ["GRPOTrainer._compute_loss"], given)
  trainer = SimpleNamespace(
    _get_per_token_logps_and_entropies=lambda *_, **__: (x, torch.zeros(B, T)),
    top_entropy_quantile=1.0,
    epsilon_low=0.2,
    epsilon_high=0.28,
    beta=0.04,
    args=SimpleNamespace(delta=None),
    use_vllm=True,
    vllm_importance_sampling_correction=True,
    current_gradient_accumulation_steps=1,
    max_completion_length=20,
    model=SimpleNamespace(training=True),
    accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x),
    _metrics=defaultdict(lambda: defaultdict(list)),
  )
  vars(trainer).update({"importance_sampling_level": "token", "loss_type": "grpo", **fields})
  prompt = torch.ones((B, 2))
  inputs = {
    "prompt_ids": prompt,
    "prompt_mask": prompt,
    "completion_ids": torch.ones((B, T)),
    "completion_mask": torch.tensor(MASK),
    "advantages": torch.tensor(ROW_ADVANTAGE[:, 0]),
    "old_per_token_logps": torch.tensor(OLD),
    "ref_per_token_logps": torch.tensor(REFERENCE),
    "importance_sampling_ratio": torch.tensor(np.exp(OLD - REFERENCE)).clamp(max=2.0),
    "num_items_in_batch": MASK.sum(),
  }
  return compute._compute_loss(trainer, None, inputs)


CLIP_HIGHER = functools.partial(policy.ppo_clip, high=0.28)
GSPO_TOKEN = functools.partial(policy.gspo_token, low=0.2, high=0.28)
TRL = [
  ({}, CLIP_HIGHER, aggregation.sequence_mean),
  ({"loss_type": "bnpo"}, CLIP_HIGHER, aggregation.local_token_mean),
  ({"loss_type": "dapo"}, CLIP_HIGHER, aggregation.token_mean),
  (
    {"loss_type": "dr_grpo"},
    CLIP_HIGHER,
    functools.partial(aggregation.constant_length, max_length=20),
  ),
  (
    {"importance_sampling_level": "sequence"},
    functools.partial(policy.gspo, low=0.2, high=0.28),
    aggregation.sequence_mean,
  ),
  (
    {
      "importance_sampling_level": "sequence_token",
      "path": "trl/experimental/gspo_token/grpo_trainer.py",
    },
    GSPO_TOKEN,
    aggregation.sequence_mean,
  ),
]


@pytest.mark.parametrize("fields, surrogate, aggregate", TRL)
def test_the_whole_loss_is_trls(torch, fields, surrogate, aggregate):
  weight = importance.truncated_tokens(jnp.asarray(OLD - REFERENCE), MASK)

  def ours(x):
    losses = weight * surrogate(x, OLD, ROW_ADVANTAGE, MASK) + 0.04 * kl.k3(x, REFERENCE)
    return reduced(aggregate, losses)

  compare(ours, lambda x: trl_loss(torch, x, **fields), torch, rtol=1e-4)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_top_entropy_is_trls(torch, share):
  name = "GRPOTrainer.get_high_entropy_mask"
  path = "trl/trainer/grpo_trainer.py"
  peer = extracted.functions("trl", "0.24.0", path, [name], {"torch": torch})
  whole = SimpleNamespace(pad_across_processes=lambda x, **_: x, gather=lambda x: x)
  trainer = SimpleNamespace(accelerator=whole)
  entropy = np.float32(RNG.uniform(0, 2, (B, T)))
  theirs = peer.get_high_entropy_mask(trainer, torch.tensor(entropy), torch.tensor(MASK), 1 - share)
  ours = policy.top_entropy(jnp.asarray(entropy), MASK, share=share)
  np.testing.assert_array_equal(ours, theirs.numpy())
  assert 0 < np.sum(ours) < MASK.sum()
