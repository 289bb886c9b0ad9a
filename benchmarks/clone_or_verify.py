"""Cloning right traces or learning from a verifier: how each uses samples, as answers grow longer.

  python -m ancestral.benchmarks.clone_or_verify --figure=docs/figures/clone_or_verify.png

One minute. A trace of H tokens of an alphabet of sixteen is to contain a planted sequence of four
as a subsequence; of each step at which it already does, the reward is 1 / H. A policy first picks
one of eight styles and then tokens, knowing the style and how much of the sequence is done. The
base policy finds the next planted token at a rate of its style: from .02 to .5 (heterogeneous), or
all of one rate whose base reward is the same. Everything is tabular; rewards are exact.

  clone:   maximum likelihood of n right traces of the base policy, with the base policy as prior
  verify:  REINFORCE from the base policy, n draws in all, a verifier telling when each was right

Cloning is given n right traces, however many draws those take, and REINFORCE n draws, right or
wrong. What cloning tends to as n grows, the base policy given that it is right, is computed too.

Reference: Setlur et al. 2025, arXiv 2502.12118. Its planted subsequences are for a transformer; its
rates are of worst cases.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from ancestral.training import advantages, policy

_FIGURE = flags.DEFINE_string("figure", None, "File for the figure.")
_SEEDS = flags.DEFINE_integer("seeds", 10, "Seeds of every run.")

STYLES, PLANTED, ALPHABET = 8, 4, 16
HORIZONS = 8, 16, 32, 64, 128
BUDGETS = 16, 64, 256, 1024, 4096
BATCH = 16  # draws an update
DRAWN = 64  # at once, to find right traces
RATES = np.geomspace(0.02, 0.5, STYLES)


def base_policy(rates) -> tuple[jax.Array, jax.Array]:
  """log p(style) [Z]; log p(token | style, done) [Z, P, A]. Token 0 is the planted one, always.

  What the others are called does not matter, nor does a policy know that 0 is good at every step.
  """
  rates = jnp.asarray(rates)[:, None, None]
  others = jnp.broadcast_to((1 - rates) / (ALPHABET - 1), (STYLES, PLANTED, ALPHABET - 1))
  tokens = jnp.concatenate([jnp.broadcast_to(rates, (STYLES, PLANTED, 1)), others], axis=-1)
  return jnp.log(jnp.full(STYLES, 1 / STYLES)), jnp.log(tokens)


def log_laws(params):
  """Both log-laws of logits."""
  return jax.tree.map(lambda logits: jax.nn.log_softmax(logits), params)


def chain(rates: jax.Array, horizon: int) -> jax.Array:
  """p(done after t tokens), [horizon + 1, ..., P + 1], of rates of progress [..., P]."""
  first = jnp.zeros((*rates.shape[:-1], PLANTED + 1)).at[..., 0].set(1)

  def step(law, _):
    moved = law[..., :-1] * rates
    kept = law.at[..., :-1].add(-moved).at[..., 1:].add(moved)
    return kept, kept

  return jnp.concatenate([first[None], jax.lax.scan(step, first, None, length=horizon)[1]])


@functools.partial(jax.jit, static_argnames="horizon")
def value(params, horizon: int) -> jax.Array:
  """The expected reward, exactly: the share of steps that end with the sequence complete."""
  style, tokens = log_laws(params)
  done = chain(jnp.exp(tokens[..., 0]), horizon)[1:, :, PLANTED]
  return jnp.mean(done @ jnp.exp(style))


def draw(key, params, num: int, horizon: int):
  """Styles [num]; tokens and what was done before each, [num, horizon]; rewards [num]."""
  style_key, token_key = jax.random.split(key)
  style_law, token_law = log_laws(params)
  styles = jax.random.categorical(style_key, style_law, shape=(num,))
  level = jax.random.uniform(token_key, (horizon, num))
  edges = jnp.cumsum(jnp.exp(token_law), axis=-1)[..., :-1]

  def step(done, level):
    at = edges[styles, jnp.minimum(done, PLANTED - 1)]
    token = jnp.sum(level[:, None] >= at, axis=-1)
    after = done + ((token == 0) & (done < PLANTED))
    return after, (token, done, after == PLANTED)

  _, (tokens, before, complete) = jax.lax.scan(step, jnp.zeros(num, jnp.int32), level)
  return styles, tokens.T, before.T, jnp.mean(complete, axis=0)


def log_prob(params, styles, tokens, before):
  """Of a trace's style and tokens, [num, 1 + horizon], and the mask: nothing counts once done."""
  style_law, token_law = log_laws(params)
  each = token_law[styles[:, None], jnp.minimum(before, PLANTED - 1), tokens]
  mask = jnp.concatenate([jnp.ones((len(styles), 1)), before < PLANTED], axis=1)
  return jnp.concatenate([style_law[styles][:, None], each], axis=1), mask


@functools.partial(jax.jit, static_argnames="horizon")
def given_right(rates, horizon: int):
  """The base policy's law of styles and tokens among right traces, projected on the policies.

  What cloning has as its limit: p(style | right), and of each style and stage the share of tokens
  that are the planted one, by expected counts (forward law times chance to finish).
  """
  rates = jnp.asarray(rates)[:, None] * jnp.ones(PLANTED)
  forward = chain(rates, horizon)  # [H + 1, Z, P + 1]
  ahead = [chain_from(rates, stage, horizon) for stage in range(PLANTED)]  # of [H + 1, Z] each
  ahead.append(jnp.ones((horizon + 1, STYLES)))
  right = forward[-1, :, -1]
  progress, stays = [], []
  for stage in range(PLANTED):
    visits = forward[:-1, :, stage]
    moved, stayed = (ahead[i][:horizon][::-1] for i in (stage + 1, stage))
    progress.append(jnp.sum(visits * rates[:, stage] * moved, axis=0))
    stays.append(jnp.sum(visits * (1 - rates[:, stage]) * stayed, axis=0))
  rate = jnp.stack([p / (p + s) for p, s in zip(progress, stays, strict=True)], axis=-1)
  others = jnp.broadcast_to(((1 - rate) / (ALPHABET - 1))[..., None], (*rate.shape, ALPHABET - 1))
  tokens = jnp.log(jnp.concatenate([rate[..., None], others], axis=-1))
  return jnp.log(right / right.sum()), tokens


def chain_from(rates, stage: int, horizon: int):
  """p(complete within t tokens) from a stage, [horizon + 1, Z]."""
  rest = jnp.concatenate([rates[:, stage:], jnp.ones((len(rates), stage))], axis=-1)
  return chain(rest, horizon)[..., PLANTED - stage :].sum(-1)


@functools.partial(jax.jit, static_argnames="horizon")
def clone(key, base, num, horizon: int):
  """Logits fitted to num right traces: counts, and the base policy as so many tokens more."""

  def again(carry):  # draws until num are right; wrong ones are skipped
    key, count, styles, tokens = carry
    key, now = jax.random.split(key)
    style, token, before, reward = draw(now, base, DRAWN, horizon)
    right = reward > 0
    right &= jnp.cumsum(right) + count <= num
    weight = (right[:, None] & (before < PLANTED)).astype(jnp.float32)
    place = jnp.minimum(before, PLANTED - 1)
    tokens = tokens.at[style[:, None], place, token].add(weight)
    return key, count + right.sum(), styles.at[style].add(right.astype(jnp.float32)), tokens

  start = key, jnp.int32(0), jnp.exp(base[0]), jnp.exp(base[1])
  _, _, styles, tokens = jax.lax.while_loop(lambda carry: carry[1] < num, again, start)
  return value((jnp.log(styles), jnp.log(tokens)), horizon)


@functools.partial(jax.jit, static_argnames="horizon")
def reinforce(key, base, num, horizon: int, rate: float = 0.1):
  """REINFORCE with leave-one-out baselines and Adam: num draws, BATCH an update, each used once."""
  optimizer = optax.adam(rate)

  def step(i, carry):
    params, state = carry
    now = jax.random.fold_in(key, i)
    styles, tokens, before, reward = draw(now, params, BATCH, horizon)
    advantage = advantages.leave_one_out(reward)[:, None]

    def loss(params):
      each, mask = log_prob(params, styles, tokens, before)
      return jnp.sum(policy.reinforce(each, each, advantage * jnp.ones_like(each), mask)) / BATCH

    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state

  params, _ = jax.lax.fori_loop(0, num // BATCH, step, (base, optimizer.init(base)))
  return value(params, horizon)


def one_rate(horizon: int) -> np.ndarray:
  """The rate of all styles at which the base policy's reward is the heterogeneous one's."""
  wanted = float(value(base_policy(RATES), horizon))
  low, high = RATES[0], RATES[-1]
  of = lambda rate: value(base_policy(jnp.full(STYLES, rate)), horizon)
  for _ in range(30):
    middle = (low + high) / 2
    low, high = (middle, high) if of(middle) < wanted else (low, middle)
  return np.full(STYLES, low)


def learnt(learn, rates, num: int, horizon: int) -> np.ndarray:
  """Rewards of what is learnt, over seeds, [S]."""
  keys = jax.random.split(jax.random.key(0), _SEEDS.value)
  over = jax.vmap(functools.partial(learn, horizon=horizon), (0, None, None))
  return np.asarray(over(keys, base_policy(rates), jnp.int32(num)))


def interval(values: np.ndarray) -> str:
  """Mean, and 1.96 standard errors over seeds."""
  return f"{values.mean():.3f} ± {1.96 * values.std(ddof=1) / np.sqrt(len(values)):.3f}"


def tabulate(name: str, settings, rates_of, rows: dict) -> None:
  """Prints a table by setting (n, H), and collects the means."""
  heads = "base | right | clone | clone, n to infinity | verify | best | verify less clone, steps"
  print(f"\n| {name} | {heads} |\n" + "|---" * 8 + "|")
  for num, horizon in settings:
    rates = rates_of(horizon)
    base = base_policy(rates)
    cloned, verified = (learnt(learn, rates, num, horizon) for learn in (clone, reinforce))
    right = float(chain(jnp.exp(base[1][..., 0]), horizon)[-1, :, -1].mean())
    best = 1 - (PLANTED - 1) / horizon
    limit = float(value(given_right(rates, horizon), horizon))
    rows[name, num, horizon] = [cloned.mean(), verified.mean(), limit]
    cells = [f"n = {num}, H = {horizon}", f"{float(value(base, horizon)):.3f}", f"{right:.3f}"]
    cells += [interval(cloned), f"{limit:.3f}", interval(verified), f"{best:.3f}"]
    cells.append(interval(horizon * (verified - cloned)))
    print("| " + " | ".join(cells) + " |", flush=True)


def draw_figure(rows: dict, path: str) -> None:
  """Rewards by n, and what verifying gains in steps by horizon."""
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(1, 2, figsize=(9, 3.3))
  for i, kind in enumerate(("heterogeneous", "one rate")):
    by_n = np.array([rows[kind, n, 32] for n in BUDGETS])
    for j, (name, style) in enumerate((("clone", "--"), ("verify", "-"), ("clone, limit", ":"))):
      axes[0].plot(BUDGETS, by_n[:, j], style, color=f"C{i}", label=f"{name}, {kind}")
    gain = [h * (rows[kind, 1024, h][1] - rows[kind, 1024, h][0]) for h in HORIZONS]
    axes[1].plot(HORIZONS, gain, "o-", color=f"C{i}", label=kind)
  axes[0].set(xscale="log", xlabel="n", ylabel="reward", title="H = 32")
  axes[1].set(xscale="log", xlabel="H", ylabel="steps", title="verify less clone, n = 1,024")
  axes[0].legend(fontsize=6)
  axes[1].legend(fontsize=7)
  figure.tight_layout()
  figure.savefig(path, dpi=130)


def main(_) -> None:
  """Prints the tables."""
  settings = [(n, 32) for n in BUDGETS] + [(1024, h) for h in HORIZONS if h != 32]
  rows = {}
  tabulate("heterogeneous", settings, lambda horizon: RATES, rows)
  tabulate("one rate", settings, one_rate, rows)
  if _FIGURE.value:
    draw_figure(rows, _FIGURE.value)


if __name__ == "__main__":
  app.run(main)
