"""Models of how good an answer is: of pairs, of outcomes, of steps, and of what one knows oneself.

A reward model is a language model's trunk and a `Head` on its hidden states; a loss of scores; and
where scores are read. Its params are {"model": ..., "head": ...}:

  head = linear()
  params = {"model": model_params, "head": head.init(key, width)}
  loss_fn = frozen(scored(model, head, at_end))     # only the head learns the outcome
  loss_fn = scored(model, head, at_prompt)          # P(IK), before anything is answered

Without a head, a model says itself whether an answer is right: `ask_whether_true`, `truth`.
Rows are those of `data.pad`: `tokens` [B, L], and `mask` [B, L] of the tokens that follow.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..models import base as models
from ..tasks import base as tasks
from ..tasks import tokenizer as tokenizers
from . import step

# mask [B, L] of targets -> the position of each row at which its score is read [B]
Where = Callable[[jax.Array], jax.Array]


def bradley_terry(
  chosen: jax.Array, rejected: jax.Array, *, margin: jax.Array | float = 0.0
) -> jax.Array:
  """-log sigmoid(s_w - s_l - m): the likelihood of a choice between two.

  Args:
    chosen: s_w [...], the score of what was chosen.
    rejected: s_l [...].
    margin: m, [...] or [], by which the better should lead; 0 is the maximum likelihood.

  Returns:
    [...], float32.

  Reference: Bradley and Terry 1952; Ouyang et al. 2022, arXiv 2203.02155; Touvron et al. 2023
    (Llama 2, the margin), arXiv 2307.09288.
  """
  return jax.nn.softplus(rejected.astype(jnp.float32) - chosen.astype(jnp.float32) + margin)


def centring(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
  """(s_w + s_l)^2, to be added with a small weight: pairs say nothing of where scores are zero.

  Reference: Eisenstein et al. 2023, arXiv 2312.09244.
  """
  return jnp.square(chosen.astype(jnp.float32) + rejected.astype(jnp.float32))


def regression(score: jax.Array, target: jax.Array) -> jax.Array:
  """-(y log f + (1 - y) log(1 - f)), f = sigmoid(score): cross-entropy of a soft label y.

  Least at f = E[y]. Its gradient is f - y.

  Args:
    score: [...], log odds.
    target: y [...], from 0 to 1, such as the share of samples that are right.

  Reference: Cobbe et al. 2021 (verifiers), arXiv 2110.14168; Kadavath et al. 2022, 2207.05221.
  """
  score, target = score.astype(jnp.float32), target.astype(jnp.float32)
  return target * jax.nn.softplus(-score) + (1 - target) * jax.nn.softplus(score)


def step_level(score: jax.Array, target: jax.Array, step_end: jax.Array) -> jax.Array:
  """The sum over steps of `regression` at their ends, [...].

  Args:
    score: [..., L].
    target: [..., L], of the step that ends here; anything elsewhere.
    step_end: [..., L], true or 1 at ends of steps.

  Reference: Lightman et al. 2023 (process supervision), arXiv 2305.20050.
  """
  here = step_end != 0
  losses = regression(jnp.where(here, score, 0.0), jnp.where(here, target, 0.0))
  return jnp.sum(jnp.where(here, losses, 0.0), axis=-1)


class Head(NamedTuple):
  """A number of a hidden state.

  Attributes:
    init: (key, D) -> params.
    apply: (params, hidden [..., D]) -> [...], float32.
  """

  init: Callable[[jax.Array, int], models.Params]
  apply: Callable[[models.Params, jax.Array], jax.Array]


def linear() -> Head:
  """w h + b, w normal with variance 1 / (D + 1) and b = 0 (Stiennon et al. 2020, 2009.01325)."""

  def init(key, width):
    return {"kernel": jax.random.normal(key, (width,)) / (width + 1) ** 0.5, "bias": jnp.zeros(())}

  def apply(params, hidden):
    return jnp.matmul(hidden.astype(jnp.float32), params["kernel"]) + params["bias"]

  return Head(init, apply)


def mlp(hidden_width: int) -> Head:
  """`linear` of silu(W h + c)."""
  last = linear()

  def init(key, width):
    first_key, last_key = jax.random.split(key)
    kernel = jax.random.normal(first_key, (width, hidden_width)) / width**0.5
    return {
      "kernel": kernel,
      "bias": jnp.zeros(hidden_width),
      "last": last.init(last_key, hidden_width),
    }

  def apply(params, hidden):
    wide = jnp.matmul(hidden.astype(jnp.float32), params["kernel"])
    bias = params["bias"].reshape((1,) * (wide.ndim - 1) + (-1,))
    return last.apply(params["last"], jax.nn.silu(wide + bias))

  return Head(init, apply)


def at_prompt(mask: jax.Array) -> jax.Array:
  """The last token of the prompt, [B]: the one before the first target; 0 without targets."""
  return jnp.argmax(mask != 0, axis=-1)


def at_end(mask: jax.Array) -> jax.Array:
  """The last token of the answer, [B]: the one before the last target, which is its end.

  So an answer is judged as if it had ended; one that was cut off is not to be shown.
  """
  return mask.shape[-1] - 1 - jnp.argmax(mask[:, ::-1] != 0, axis=-1)


def scores(
  model: models.LanguageModel, head: Head, params: models.Params, tokens: jax.Array, *, key=None
) -> jax.Array:
  """The head's score [B, L] at each of the tokens [B, L]."""
  hidden, _ = models.apply(model, params["model"], tokens, key=key)
  return head.apply(params["head"], hidden)


def frozen(loss_fn: step.LossFn) -> step.LossFn:
  """The same loss without a gradient for params["model"].

  An optimizer that decays weights still moves them: mask it (`optax.masked`), or do not keep them
  among the params.
  """

  def loss(key, params, batch):
    return loss_fn(key, {**params, "model": jax.lax.stop_gradient(params["model"])}, batch)

  return loss


def scored(model: models.LanguageModel, head: Head, where: Where) -> step.LossFn:
  """`regression` of the score at one position of each row on its `label` [B].

  With `at_end` and labels right or wrong it is an outcome reward model; with `at_prompt` and the
  share of samples that are right, P(IK), the probability that "I know" (Kadavath et al. 2022, arXiv
  2207.05221): a row is then a prompt with an empty answer.

  Weights are 1, or 0 where the mask is empty. Metrics: `predicted`, `label`, `brier_score`.
  """
  return _labelled(
    lambda key, params, batch: _pick(
      scores(model, head, params, batch["tokens"], key=key), where(batch["mask"])
    )
  )


def truth(model: models.LanguageModel, true: int, false: int) -> step.LossFn:
  """`regression` of `log_odds` of two tokens after the prompt on `label` [B]: trains P(True).

  The params are the model's own. Weights and metrics are those of `scored`.
  """

  def score(key, params, batch):
    hidden, _ = models.apply(model, params, batch["tokens"], key=key)
    here = at_prompt(batch["mask"])[:, None, None]
    last = jnp.take_along_axis(hidden, here, axis=1)[:, 0]
    return log_odds(model.readout(params, last), true, false)

  return _labelled(score)


def step_scored(model: models.LanguageModel, head: Head) -> step.LossFn:
  """`step_level` of each row: a process reward model; the batch is of `step_row`.

  A row's weight is its number of steps. Metrics: `accuracy`, of steps at even odds.
  """

  def loss(key, params, batch):
    score = scores(model, head, params, batch["tokens"], key=key)
    label, ends = batch["label"], batch["step_end"] != 0
    right = ends & ((score > 0) == (label > 0.5))
    weight = jnp.sum(ends, axis=-1).astype(jnp.float32)
    metrics = {"accuracy": jnp.sum(right, axis=-1).astype(jnp.float32)}
    return (step_level(score, label, ends), weight), metrics

  return loss


def compared(
  model: models.LanguageModel, head: Head, *, centring_weight: float = 0.0
) -> step.LossFn:
  """`bradley_terry` of the scores at the ends of two answers.

  The batch has `chosen` and `rejected`, each with `tokens` and `mask`, and perhaps `margin` [B].
  Weights are 1, or 0 where a mask is empty. Metrics: `accuracy`, a tie counted half; `lead`.
  """

  def loss(key, params, batch):
    keys = (None, None) if key is None else jax.random.split(key)
    won, lost = (
      _pick(scores(model, head, params, one["tokens"], key=key), at_end(one["mask"]))
      for key, one in zip(keys, (batch["chosen"], batch["rejected"]), strict=True)
    )
    present = _present(batch["chosen"]["mask"]) * _present(batch["rejected"]["mask"])
    losses = bradley_terry(won, lost, margin=batch.get("margin", 0.0))
    losses += centring_weight * centring(won, lost)
    metrics = {"accuracy": (1 + jnp.sign(won - lost)) / 2, "lead": won - lost}
    return (present * losses, present), {name: present * x for name, x in metrics.items()}

  return loss


def step_row(
  tokenizer: tokenizers.Tokenizer,
  prompt: str,
  steps: Sequence[str],
  correct: Sequence[float],
  *,
  length: int,
) -> dict[str, np.ndarray]:
  """[bos] prompt steps as a row of `step_scored`: each step's label is at its last token.

  Args:
    tokenizer: of the model.
    prompt: the question.
    steps: texts that follow it, separators included, none of them empty.
    correct: what each step's score should be: 1 where it is right, and 0.
    length: L of the row, filled up with padding.

  Raises:
    ValueError: a step without tokens, or a row that is too short.
  """
  tokens = tokenizer.opened(prompt)
  label, ends = np.zeros(length, np.float32), np.zeros(length, np.float32)
  for text, value in zip(steps, correct, strict=True):
    if not (added := tokenizer.encode(text)):
      raise ValueError(f"step {text!r} has no tokens: leave it out")
    tokens += added
    if len(tokens) > length:
      raise ValueError(f"{len(tokens)} tokens and more do not fit a row of {length}: raise length")
    label[len(tokens) - 1], ends[len(tokens) - 1] = value, 1
  filled = np.full(length, tokenizer.pad, np.int32)
  filled[: len(tokens)] = tokens
  return {"tokens": filled, "label": label, "step_end": ends}


ASK = "Question: {prompt}\nProposed answer: {response}\nIs it right, True or False? "
ASK_AMONG = "Question: {prompt}\nSome answers:\n{others}\n" + ASK.partition("\n")[2]


def ask_whether_true(
  problem: tasks.Problem, response: str, *, others: Sequence[str] = (), template: str = ASK
) -> str:
  """A prompt that asks whether a response is right; P(True) is read after it with `log_odds`.

  Args:
    problem: the question.
    response: what was answered.
    others: more of the model's own samples, a line each, which help it to judge this one.
    template: of {prompt}, {response} and {others}, in characters that the tokenizer has; give
      `ASK_AMONG` or another with {others} where there are others.

  Raises:
    ValueError: `others` that the template would not show.

  Reference: Kadavath et al. 2022, arXiv 2207.05221, P(True); the wording is ours.
  """
  if others and "{others}" not in template:
    raise ValueError("the template has no place for {others}: use ASK_AMONG, or leave them out")
  return template.format(prompt=problem.prompt, response=response, others="\n".join(others))


def log_odds(logits: jax.Array, true: int, false: int) -> jax.Array:
  """logits[true] - logits[false], [...]: the log odds of one token given that it is one of two.

  Args:
    logits: [..., V].
    true: the token that says yes.
    false: the token that says no.
  """
  logits = logits.astype(jnp.float32)
  return logits[..., true] - logits[..., false]


def _labelled(score: Callable[..., jax.Array]) -> step.LossFn:
  """The loss of a score [B] of a row as log odds of its label."""

  def loss(key, params, batch):
    at, label = score(key, params, batch), batch["label"].astype(jnp.float32)
    present, f = _present(batch["mask"]), jax.nn.sigmoid(at)
    metrics = {"predicted": f, "label": label, "brier_score": jnp.square(f - label)}
    losses = present * regression(at, label)
    return (losses, present), {name: present * x for name, x in metrics.items()}

  return loss


def _pick(values, positions):
  return jnp.take_along_axis(values, positions[:, None], axis=-1)[:, 0]


def _present(mask):
  return jnp.any(mask != 0, axis=-1).astype(jnp.float32)
