"""Preference between steps of reasoning: which tokens of two responses are compared, and how much.

One kernel, `weighted_ratio`, makes what a `preference.PairLoss` takes out of tokens' log-ratios and
weights; a method is a choice of weights, made beside the data (numpy, one response at a time):

  wrong = stepwise.first_wrong(verdicts)                               # Step-DPO
  weight = stepwise.in_step(stepwise.step_numbers(tokens, newline), wrong)
  chosen, rejected = stepwise.after_divergence(better, worse)          # MCTS-DPO
  chosen, rejected = stepwise.changed_tokens(solution, edited)         # RISE

  preference.dpo(weighted_ratio(c, chosen), weighted_ratio(r, rejected), beta=0.4)
"""

import difflib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from . import preference


def weighted_ratio(log_ratio: jax.Array, weight: jax.Array) -> jax.Array:
  """sum_t w_t (log pi(y_t) - log pi_ref(y_t)), [...], float32.

  Weights 1 are DPO's, a mask / length its mean per token, a step's or a signed advantage what the
  functions below make. Padding of either side has the weight 0, and there the ratio may be NaN or
  infinite: it has no gradient.

  Args:
    log_ratio: [..., T].
    weight: w [..., T].
  """
  return jnp.sum(jnp.where(weight != 0, log_ratio.astype(jnp.float32), 0) * weight, axis=-1)


def step_apo(
  chosen: jax.Array,
  rejected: jax.Array,
  chosen_value: jax.Array,
  rejected_value: jax.Array,
  *,
  beta: float = 0.3,
  alpha: float = 1.0,
) -> jax.Array:
  """-log sigmoid(beta (c - r) - alpha (A_w - A_l)), [...]: a better step has a larger margin.

  Two steps from one state differ in advantage as in value, A_w - A_l = Q_w - Q_l.

  Args:
    chosen: c [...], `weighted_ratio` of the better step.
    rejected: r [...].
    chosen_value: Q_w [...], of a tree search; -1 to 1 in the paper's.
    rejected_value: Q_l [...].
    beta: of `preference.dpo`.
    alpha: of the margin asked for; 0 is DPO.

  Reference: Wang et al. 2024 (CPL), arXiv 2409.08642, and its code, which this follows.
  """
  gap = chosen_value.astype(jnp.float32) - rejected_value.astype(jnp.float32)
  return preference.dpo(chosen.astype(jnp.float32) - alpha / beta * gap, rejected, beta=beta)


def visit_smoothing(chosen_visits: jax.Array, rejected_visits: jax.Array) -> jax.Array:
  """min(1/2, n_l / (n_l + max(1, n_w))), [...]: how doubtful a preference of a tree search is.

  For `preference.conservative`: visits n_w and n_l of the two steps' nodes make the confidence
  1 / (1 + n_l / max(1, n_w)).

  Reference: Xie et al. 2024 (MCTS-DPO), arXiv 2405.00451, and its code, which this follows.
  """
  worse = jnp.asarray(rejected_visits, jnp.float32)
  return jnp.minimum(worse / (worse + jnp.maximum(jnp.asarray(chosen_visits, jnp.float32), 1)), 0.5)


def step_advantages(values: np.ndarray) -> np.ndarray:
  """A_i = Q(s_i, a_i) - V(s_i) = V(s_{i+1}) - V(s_i), [..., S], of values [..., S + 1].

  A state is the problem and the steps so far: a step's Q is the value of what it leads to. Values
  are success rates of rollouts from there, the last one is whether the answer is right.

  Reference: Setlur et al. 2024, arXiv 2406.14532.
  """
  return np.diff(np.asarray(values, np.float64), axis=-1)


def best_and_worst(advantages: Sequence[float]) -> tuple[int, int] | None:
  """Which two of several next steps from one state make a pair, the better first.

  None where none is better than another; of equals, the first.
  """
  best, worst = int(np.argmax(advantages)), int(np.argmin(advantages))
  return None if advantages[best] == advantages[worst] else (best, worst)


def step_numbers(tokens: Sequence[int], separator: int) -> np.ndarray:
  """The step, from 0, of each token, [T]; a separator is the last token of its step."""
  ends = np.asarray(tokens, np.int64) == separator
  return np.cumsum(ends) - ends


def in_step(steps: np.ndarray, step: int) -> np.ndarray:
  """The weights of one step's tokens, [T]: Step-DPO, with the steps before it as shared context.

  The chosen response is the same prefix with the step's correction. Steps after a wrong one follow
  from it, so that the first mistake is all there is to unlearn.

  Reference: Lai et al. 2024 (Step-DPO), arXiv 2406.18629.
  """
  return (steps == step).astype(np.float32)


def first_wrong(verdicts: Sequence[bool]) -> int | None:
  """The first step that is not right; None where all are."""
  return next((i for i, right in enumerate(verdicts) if not right), None)


def of_steps(steps: np.ndarray, step_weights: np.ndarray) -> np.ndarray:
  """The weight of each token's step, [T], such as of `step_advantages`."""
  return np.asarray(step_weights, np.float32)[steps]


def after_divergence(
  chosen: Sequence[int], rejected: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
  """Weights of all tokens from the first one on in which two responses differ, [T], [U].

  What comes before has the same log-ratio in both: it cancels in c - r, but not in losses of c and
  r apart. Where one response begins the other, only the rest of the longer one counts.

  Reference: Xie et al. 2024 (MCTS-DPO), arXiv 2405.00451, the released code.
  """
  pairs = enumerate(zip(chosen, rejected, strict=False))
  first = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
  return tuple((np.arange(len(y)) >= first).astype(np.float32) for y in (chosen, rejected))


def changed_tokens(solution: Sequence[int], edited: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
  """Weights of the tokens that an edit replaced and of those it put there, [T], [U].

  All others are the same in both; their ratios differ by the changed context only. The edit is what
  difflib finds, a longest common block at a time.

  Reference: Xu et al. 2024 (RISE), arXiv 2410.06638. Its released code sums all tokens.
  """
  weights = np.ones(len(solution), np.float32), np.ones(len(edited), np.float32)
  matcher = difflib.SequenceMatcher(None, list(solution), list(edited), autojunk=False)
  for block in matcher.get_matching_blocks():
    weights[0][block.a : block.a + block.size] = 0
    weights[1][block.b : block.b + block.size] = 0
  return weights
