"""Rollouts: groups of samples, as rows to learn from, and what a verifier says of them.

    sample = rollouts.sampler(model, filters=(truncation.top_p(0.9),), group_size=8, ...)
    made = rollouts.roll_out(sample, params, task, problems, key, verify_all=verify_all, ...)
    made.rewards()                       # [P, G]
    made.rows                            # what `scoring.scores` scores: [P * G, L]

Request numbers are those of the rollout's own run: sample j of problem i depends on the key, the
parameters and i * G + j alone, so a run that was stopped draws them again.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..evaluation import attempts as attempts_lib
from ..models import base as models
from ..sampling import base as sampling
from ..sampling import decode, logits, sharded
from ..tasks import base as tasks
from ..tasks import workers
from . import metrics, scoring

# tokens, targets, mask, log_prob [N, L], and where a filter was on, kept [N, L, ceil(V / 8)].
Rows = dict[str, Any]

# (params, temperature, keys [P G], prompts [P]) -> Samples [P G], rows.
Sample = Callable[..., tuple[decode.Samples, Rows]]


class Rollouts(NamedTuple):
  """P problems and G samples of each."""

  attempts: list[attempts_lib.Attempt]  # P
  lengths: np.ndarray  # [P, G], tokens drawn
  rows: Rows  # numpy, of samples in order
  seconds: dict[str, float]  # "sampling", "verifying"

  def rewards(self) -> np.ndarray:
    """1 where the verifier says that a sample is right, else 0; [P, G] float32."""
    return np.array([[v.correct for v in a.verdicts] for a in self.attempts], np.float32)

  def faults(self) -> float:
    """The share of samples whose verifier failed; they count as wrong."""
    reasons = [v.reason for a in self.attempts for v in a.verdicts]
    return float(np.mean([reason.startswith(workers.FAULT) for reason in reasons]))


def as_rows(samples: decode.Samples, kept: jax.Array | None = None) -> Rows:
  """Samples aligned for scoring: at each position the token read and the one drawn after it.

  Args:
    samples: of B rows, P + N tokens wide.
    kept: [B, N, ceil(V / 8)] of the n-th drawn token, see `scoring.pack`.

  Returns:
    `tokens`, `targets` [B, P + N - 1]; `mask`, 1 where the target was drawn; `log_prob` of it under
    the law it was drawn from; and `kept`, where it is given.
  """
  width, num_new = samples.tokens.shape[1], samples.log_prob.shape[1]
  at = jnp.arange(1, width)[None, :]
  drawn = (at >= samples.prompt_length[:, None]) & (at < samples.length[:, None])
  nth = jnp.clip(at - samples.prompt_length[:, None], 0, num_new - 1)
  log_prob = jnp.take_along_axis(samples.log_prob, nth, axis=1)
  rows = {
    "tokens": samples.tokens[:, :-1],
    "targets": samples.tokens[:, 1:],
    "mask": drawn.astype(jnp.float32),
    "log_prob": jnp.where(drawn, log_prob, 0),
  }
  if kept is None:
    return rows
  sets = jnp.take_along_axis(kept, nth[..., None], axis=1)
  return {**rows, "kept": jnp.where(drawn[..., None], sets, jnp.uint8(0))}


def sampler(
  model: models.LanguageModel,
  *,
  group_size: int,
  max_new_tokens: int,
  stop: Sequence[int],
  filters: Sequence[logits.LogitsTransform] = (),
) -> Sample:
  """A jitted (params, temperature, keys [P G], prompts [P]) -> Samples and rows; one compilation.

  Args:
    model: the model.
    group_size: G, samples of a prompt; they share its prefill.
    max_new_tokens: the most drawn.
    stop: tokens that end a sample.
    filters: after the temperature; they may only filter, since rows carry the set that they leave
      and scores are renormalised over it.
  """

  @jax.jit
  def sample(params, temperature, keys, prompts):
    samples, kept = decode.generate_observed(
      model,
      params,
      keys,
      prompts,
      (lambda info: scoring.pack(info.kept)) if filters else (lambda info: None),
      max_new_tokens=max_new_tokens,
      transform=logits.chain(logits.temperature(temperature), *filters),
      stop=stop,
      num_samples=group_size,
    )
    return samples, as_rows(samples, kept)

  return sample


def roll_out(
  sample: Sample,
  params: models.Params,
  task: tasks.Task,
  problems: Sequence[tasks.Problem],
  key: jax.Array,
  *,
  verify_all: workers.VerifyAll,
  temperature: float,
  group_size: int,
  batch_size: int,
  max_length: int,
  max_new_tokens: int,
  place: Callable[[Any], Any] = lambda tree: tree,
) -> Rollouts:
  """Samples of each problem, verified.

  Args:
    sample: see `sampler`, whose `group_size` and `max_new_tokens` are these.
    params: to sample from.
    task: whose tokenizer and verifier.
    problems: P.
    key: of these rollouts.
    verify_all: of the responses that ended; see `tasks.workers`.
    temperature: above 0.
    group_size: G.
    batch_size: samples drawn at once, at least G; they are whole groups.
    max_length: of a sequence.
    max_new_tokens: the most drawn.
    place: puts keys and prompts on devices, such as over a mesh.

  Raises:
    ValueError: a prompt does not fit.
  """
  start = time.perf_counter()
  at_once = min(max(batch_size // group_size, 1), len(problems))
  prompts = decode.pad_prompts(
    [task.tokenizer.opened(problem.prompt) for problem in problems],
    vocab_size=task.tokenizer.vocab_size,
    max_length=max_length,
    max_new_tokens=max_new_tokens,
  )
  drawn = []
  for first in range(0, len(problems), at_once):
    index = np.minimum(np.arange(first, first + at_once), len(problems) - 1)
    requests = (index[:, None] * group_size + np.arange(group_size)[None, :]).ravel()
    keys = sampling.row_keys(key, jnp.asarray(requests))
    some = jax.tree.map(lambda leaf, index=index: leaf[index], prompts)
    drawn.append(sample(params, temperature, *place((keys, some))))
    drawn[-2:-1] = sharded.to_host(drawn[-2:-1])  # not the one under way: devices hold two batches
  drawn = sharded.to_host(drawn)
  join = lambda *parts: np.concatenate(parts)[: len(problems) * group_size]
  samples, rows = jax.tree.map(join, *drawn)
  responses = list(map(functools.partial(_response, task.tokenizer), *samples[:4]))
  grouped = [
    responses[first : first + group_size] for first in range(0, len(responses), group_size)
  ]
  sampled = time.perf_counter()
  judged = attempts_lib.judge_all(task, problems, grouped, verify_all)
  seconds = {"sampling": sampled - start, "verifying": time.perf_counter() - sampled}
  lengths = (samples.length - samples.prompt_length).reshape(-1, group_size)
  return Rollouts(judged, lengths, rows, seconds)


def _response(tokenizer, tokens, length, prompt_length, log_prob) -> attempts_lib.Response:
  drawn = tokens[prompt_length:length].tolist()
  return attempts_lib.response(tokenizer, drawn, float(log_prob.sum()))


class Log(NamedTuple):
  """A file of rollouts that one can read."""

  write: Callable[[int, Rollouts, np.ndarray], None]  # (step, rollouts, rewards [P, G])
  close: Callable[[], None]


def no_log() -> Log:
  """Writes nothing."""
  return Log(lambda step, rollouts, rewards: None, lambda: None)


def jsonl(path: str | os.PathLike, *, step: int = 0) -> Log:
  """One line for each problem of a round: its samples, their verdicts and rewards.

    {"step": 3, "prompt": "12+7=", "key": "12+7", "level": 2, "samples": [{"text": "91", "reward":
     1.0, "correct": true, "reason": "", "log_prob": -0.4, "num_tokens": 3}, ...]}

  Args:
    path: the file, made when missing.
    step: the step from which the run starts or resumes; lines beyond it are dropped.
  """
  file = metrics.resumed(path, step)

  def write(step, rollouts, rewards):
    totals = rollouts.rows["log_prob"].sum(axis=-1, dtype=np.float64).reshape(rewards.shape)
    for attempt, *columns in zip(rollouts.attempts, rewards, totals, rollouts.lengths, strict=True):
      samples = [
        {
          "text": text,
          "reward": float(reward),
          "correct": verdict.correct,
          "reason": verdict.reason,
          "log_prob": round(float(log_prob), 6),
          "num_tokens": int(length),
        }
        for text, verdict, reward, log_prob, length in zip(
          attempt.responses, attempt.verdicts, *columns, strict=True
        )
      ]
      problem = attempt.problem
      about = {name: problem.metadata[name] for name in ("key", "level")}
      record = {"step": step, "prompt": problem.prompt, **about, "samples": samples}
      file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()

  return Log(write, file.close)
