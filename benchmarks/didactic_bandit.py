"""A bandit whose reward peaks far from the reference: who finds it, from fresh samples or from old.

  python -m ancestral.benchmarks.didactic_bandit --figure=docs/figures/didactic_bandit.png

Two minutes. A hundred arms; the reference is a bell at arm 20, a tenth of it spread evenly;
the reward exp(-((arm - peak) / 10)^2) peaks at 20, 45 or 70. The policy is a softmax of a hundred
logits. Every method makes the same number of updates from groups of the same size: offline ones
from a fixed set of groups that the reference drew, on-policy ones from groups that the policy draws
at each update, and in between a share of each. Rewards are exact expectations.

Methods differ in two things: whether they draw, and whether they push down. Cloning the best of a
group and reward-weighted regression only push up; DPO, IPO and REINFORCE also push down. Each has
the best of three learning rates, by final reward; plus-minus is a 95% interval over seeds.

Reference: Tajwar et al. 2024, arXiv 2404.14367, whose code's rewards and number of arms these are.
Its policy is a network of a context; here there is one context.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from ancestral.training import advantages, policy, preference

_FIGURE = flags.DEFINE_string("figure", None, "File for the figure.")
_SEEDS = flags.DEFINE_integer("seeds", 8, "Seeds of every run.")
_UPDATES = flags.DEFINE_integer("updates", 1000, "Gradient steps.")

ARMS = 100
PEAKS = 20, 45, 70
GROUPS, GROUP = 10, 10  # of an update
OLD_GROUPS = 100  # that the reference drew
RATES = 0.01, 0.03, 0.1, 0.3
SHARES = 0.1, 0.25, 0.5  # of fresh groups
SPREADS = 0.0, 0.01, 0.3  # of the reference, beside .1


def reference(spread: float = 0.1) -> jax.Array:
  """Log-probabilities of the arms, [ARMS]: a bell at 20, `spread` of the mass even."""
  bell = jax.nn.softmax(-0.5 * jnp.square((jnp.arange(ARMS) - 20) / 10))
  return jnp.log((1 - spread) * bell + spread / ARMS)


def reward_of(peak: float) -> jax.Array:
  """The reward of each arm, [ARMS]."""
  return jnp.exp(-jnp.square((jnp.arange(ARMS) - peak) / 10))


# (log pi of drawn arms, log reference, old log pi, rewards), each [G, N] -> a loss a group [G]


def best_of(log_prob, log_reference, old, reward):
  """Cloning the best of the group."""
  best = jnp.argmax(reward, axis=-1, keepdims=True)
  return -jnp.take_along_axis(log_prob, best, axis=-1)[..., 0]


def weighted(log_prob, log_reference, old, reward, *, beta=0.25):
  """Reward-weighted regression: cloning with weights softmax(reward / beta) over the batch."""
  weight = jax.nn.softmax(reward.reshape(-1) / beta).reshape(reward.shape)
  return -jnp.sum(weight * log_prob, axis=-1) * reward.shape[0]


def every_pair(log_prob, log_reference, old, reward, *, loss):
  """A loss of `preference`, the mean over all pairs of the group that differ in reward."""
  ratio = log_prob - log_reference
  first, second = jnp.broadcast_arrays(ratio[:, :, None], ratio[:, None, :])
  better = reward[:, :, None] > reward[:, None, :]
  losses = jnp.where(better, loss(first, second), 0)
  return jnp.sum(losses, axis=(1, 2)) / jnp.maximum(jnp.sum(better, axis=(1, 2)), 1)


def extremes(log_prob, log_reference, old, reward, *, loss):
  """A loss of `preference` of the group's best and worst."""
  ratio = log_prob - log_reference
  ends = [f(reward, axis=-1, keepdims=True) for f in (jnp.argmax, jnp.argmin)]
  return loss(*(jnp.take_along_axis(ratio, end, axis=-1)[..., 0] for end in ends))


def policy_gradient(log_prob, log_reference, old, reward, *, surrogate):
  """A surrogate of `policy`, with leave-one-out advantages."""
  advantage = advantages.leave_one_out(reward)
  return jnp.mean(surrogate(log_prob, old, advantage, jnp.ones(reward.shape)), axis=-1)


def draw(key: jax.Array, logits: jax.Array, groups: int) -> jax.Array:
  """Arms, [groups, GROUP]."""
  return jax.random.choice(key, ARMS, (groups, GROUP), p=jax.nn.softmax(logits))


class Method(NamedTuple):
  """A loss, and from which samples."""

  name: str
  loss: object
  fresh: float  # share of groups that the policy draws
  down: bool  # pushes down what is worse
  inner: int = 1  # updates on one batch


DPO = functools.partial(every_pair, loss=functools.partial(preference.dpo, beta=0.1))
ENDS = functools.partial(extremes, loss=functools.partial(preference.dpo, beta=0.1))
IPO = functools.partial(every_pair, loss=functools.partial(preference.ipo, beta=0.02))
REINFORCE = functools.partial(policy_gradient, surrogate=policy.reinforce)
PPO = functools.partial(policy_gradient, surrogate=policy.ppo_clip)
METHODS = (
  Method("best-of-10 cloning, offline", best_of, 0.0, False),
  Method("reward-weighted, offline", weighted, 0.0, False),
  Method("DPO, offline", DPO, 0.0, True),
  Method("DPO of best and worst, offline", ENDS, 0.0, True),
  Method("IPO, offline", IPO, 0.0, True),
  Method("best-of-10 cloning, on policy", best_of, 1.0, False),
  Method("reward-weighted, on policy", weighted, 1.0, False),
  Method("DPO, on policy", DPO, 1.0, True),
  Method("DPO of best and worst, on policy", ENDS, 1.0, True),
  Method("IPO, on policy", IPO, 1.0, True),
  Method("REINFORCE", REINFORCE, 1.0, True),
  Method("PPO, 4 updates a batch", PPO, 1.0, True, 4),
)


class Curves(NamedTuple):
  """Of one run, by update, [T]; and the policy at the end [ARMS]."""

  reward: jax.Array
  divergence: jax.Array  # KL(pi, reference)
  final: jax.Array


@functools.partial(jax.jit, static_argnames=("loss", "inner", "updates"))
def train(key, rewards, start, rate, fresh, *, loss, inner, updates) -> Curves:
  """Adam on the arms' logits, from the reference."""
  old_key, run_key = jax.random.split(key)
  old_arms = draw(old_key, start, OLD_GROUPS)
  optimizer = optax.adam(rate)

  def objective(logits, arms, log_old):
    log_prob = jax.nn.log_softmax(logits)
    return jnp.mean(loss(log_prob[arms], start[arms], log_old[arms], rewards[arms]))

  def update(carry, step):
    logits, state, arms, log_old = carry
    draw_key, pick_key = jax.random.split(jax.random.fold_in(run_key, step))
    new = draw(draw_key, logits, GROUPS)
    picked = old_arms[jax.random.randint(pick_key, (GROUPS,), 0, OLD_GROUPS)]
    mixed = jnp.where((jnp.arange(GROUPS) < fresh * GROUPS)[:, None], new, picked)
    renew = step % inner == 0
    arms = jnp.where(renew, mixed, arms)
    log_old = jnp.where(renew, jax.nn.log_softmax(logits), log_old)
    updates, state = optimizer.update(jax.grad(objective)(logits, arms, log_old), state)
    logits = optax.apply_updates(logits, updates)
    log_prob = jax.nn.log_softmax(logits)
    seen = jnp.exp(log_prob) @ rewards, jnp.exp(log_prob) @ (log_prob - start)
    return (logits, state, arms, log_old), seen

  carry = (start, optimizer.init(start), jnp.zeros((GROUPS, GROUP), jnp.int32), start)
  (logits, *_), seen = jax.lax.scan(update, carry, jnp.arange(updates))
  return Curves(*seen, jax.nn.softmax(logits))


def runs(method: Method, peak: float, start: jax.Array) -> Curves:
  """Over seeds [S, ...], with the learning rate whose final reward is highest."""
  keys = jax.random.split(jax.random.key(0), _SEEDS.value)
  one = functools.partial(train, loss=method.loss, inner=method.inner, updates=_UPDATES.value)
  over = jax.vmap(jax.vmap(one, (0, None, None, None, None)), (None, None, None, 0, None))
  every = over(keys, reward_of(peak), start, jnp.array(RATES), jnp.float32(method.fresh))
  best = int(jnp.argmax(jnp.mean(every.reward[:, :, -1], axis=1)))
  return jax.tree.map(lambda x: np.asarray(x[best]), every)


def interval(values: np.ndarray) -> str:
  """Mean, and 1.96 standard errors over seeds."""
  return f"{values.mean():.3f} ± {1.96 * values.std(ddof=1) / np.sqrt(len(values)):.3f}"


def updates_to(reward: np.ndarray, level: float) -> str:
  """The median over seeds of the first update whose reward [S, T] is above the level."""
  first = np.where((reward > level).any(1), np.argmax(reward > level, axis=1) + 1.0, np.inf)
  found = np.median(first)
  return f"{found:.0f}" if np.isfinite(found) else "never"


def draw_figure(curves: dict, path: str) -> None:
  """Rewards by update at the far peak; the policies at the end."""
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(1, 2, figsize=(13, 3.6))
  colors = plt.get_cmap("tab20").colors
  for i, (method, found) in enumerate(curves.items()):
    style = "-" if method.fresh else "--"
    axes[0].plot(found.reward.mean(0), style, color=colors[i], label=method.name, lw=1.3)
    axes[1].plot(found.final.mean(0), style, color=colors[i], lw=1.1)
  axes[1].fill_between(np.arange(ARMS), np.exp(reference()), color="0.85", label="reference")
  axes[1].plot(0.1 * np.asarray(reward_of(PEAKS[-1])), "k:", lw=1, label="reward / 10")
  axes[0].set(xlabel="update", ylabel="expected reward", title="the peak at arm 70")
  axes[1].set(xlabel="arm", ylabel="probability", title="policies at the end", ylim=(0, 0.2))
  axes[0].legend(fontsize=7, loc="upper right", bbox_to_anchor=(-0.13, 1.05))
  axes[1].legend(fontsize=7)
  figure.tight_layout()
  figure.savefig(path, dpi=130)


def main(_) -> None:
  """Prints the tables."""
  start = reference()
  far = {}
  print("| method | fresh | pushes down | peak at 20 | at 45 | at 70 | KL | updates to .5 |")
  print("|---" * 8 + "|")
  for method in METHODS:
    found = [runs(method, peak, start) for peak in PEAKS]
    far[method] = found[-1]
    cells = [interval(curves.reward[:, -1]) for curves in found]
    cells += [f"{far[method].divergence[:, -1].mean():.2f}", updates_to(far[method].reward, 0.5)]
    marks = ["yes" if x else "no" for x in (method.fresh, method.down)]
    print(f"| {method.name} | " + " | ".join(marks + cells) + " |", flush=True)
  initial = [float(jnp.exp(start) @ reward_of(peak)) for peak in PEAKS]
  print("| the reference | | | " + " | ".join(f"{r:.3f}" for r in initial) + " | 0 | |")

  print("\n| peak at 70, share of fresh groups | " + " | ".join(f"{s:g}" for s in SHARES) + " |")
  print("|---" * (len(SHARES) + 1) + "|")
  for method in METHODS[:5]:
    cells = [interval(runs(method._replace(fresh=s), 70, start).reward[:, -1]) for s in SHARES]
    print(f"| {method.name.removesuffix(', offline')} | " + " | ".join(cells) + " |", flush=True)

  print("\n| peak at 70, even mass of the reference | " + " | ".join(map(str, SPREADS)) + " |")
  print("|---" * (len(SPREADS) + 1) + "|")
  for method in METHODS:
    cells = [interval(runs(method, 70, reference(s)).reward[:, -1]) for s in SPREADS]
    print(f"| {method.name} | " + " | ".join(cells) + " |", flush=True)
  if _FIGURE.value:
    draw_figure(far, _FIGURE.value)


if __name__ == "__main__":
  app.run(main)
