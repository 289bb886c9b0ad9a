"""How long masked sampling takes: first hitting, and ancestral sampling with as good a law.

  python -m ancestral.benchmarks.first_hitting            # a Markdown table

Ancestral sampling in T steps writes a token together with others of its sequence with probability
1 - (1 - 1/T)^(L - 1), and then as if they were independent; its law is that of first hitting as
this goes to 0. `every step` calls the network in each of the T steps and draws at every position,
as published code does; `when needed` is `masked.ancestral`, which calls it in steps that write; the
last is one token of each row a call. Times are of a batch: of whole runs where they take less than
--seconds, and otherwise of so many steps, in proportion (marked ~).
"""

import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ancestral.models import mask_schedules, transformer
from ancestral.models import masked as masked_models
from ancestral.sampling import base, masked

_LENGTHS = flags.DEFINE_list("lengths", ["64", "256", "1024"], "Tokens of a sequence.")
_FACTORS = flags.DEFINE_list("factors", ["1", "4", "16"], "T over the length.")
_BATCH = flags.DEFINE_integer("batch_size", 4, "Sequences.")
_VOCAB = flags.DEFINE_integer("vocab_size", 256, "Tokens that there are.")
_WIDTH = flags.DEFINE_integer("width", 128, "Of the transformer.")
_LAYERS = flags.DEFINE_integer("num_layers", 4, "Of the transformer.")
_SECONDS = flags.DEFINE_float("seconds", 40.0, "The longest that a run may take.")

LINEAR = mask_schedules.linear()


def every_step(predict, times, *, mask: int) -> base.SamplingAlgorithm:
  """Ancestral sampling that calls the network, and draws at every position, in every step."""
  times = jnp.asarray(times, jnp.float32)

  def step(keys, state):
    choose_keys, token_keys = base.split(keys)
    t, s = times[state.step], times[state.step + 1]
    prob = mask_schedules.unmask_prob(LINEAR, t, s)
    leaves = masked.coins(choose_keys, prob, state.tokens == mask)
    logits = predict(state.tokens, t)
    log_p = masked.transformed(logits, state.tokens, masked.NO_TRANSFORM)
    token = masked.draw_each(token_keys, log_p)
    return masked.written(state, leaves, token, log_p, logits, state.step >= 0)

  return base.SamplingAlgorithm(lambda keys, tokens: masked.start(tokens), step)


def seconds(
  algorithm: Callable, params, length: int, num_steps: int, repeats: int = 3
) -> tuple[float, float, bool]:
  """(seconds of `num_steps` steps, calls a sequence, whether they were all made)."""
  tokens = jnp.full((_BATCH.value, length), _VOCAB.value, jnp.int32)

  @jax.jit
  def run(params, keys, tokens, num):
    made = algorithm(params)
    state = base.start(keys, made, tokens)
    never = lambda state: jnp.zeros(state.step.shape, bool)
    return base.run_until(keys, made, state, never, num).calls

  def timed(seed, num):
    keys = base.row_keys(jax.random.key(seed), jnp.arange(_BATCH.value))
    begin = time.perf_counter()
    calls = jax.block_until_ready(run(params, keys, tokens, num))
    return time.perf_counter() - begin, float(np.mean(calls))

  timed(0, 1)
  few = min(num_steps, 64)  # by the linear schedule, all parts of a run write alike
  first = timed(0, few)[0]
  if first * num_steps / few <= _SECONDS.value:
    took, calls = zip(*(timed(seed, num_steps) for seed in range(repeats)), strict=True)
    return min(took), float(np.mean(calls)), True
  return min(first, timed(1, few)[0]) * num_steps / few, math.nan, False


def main(_: Sequence[str]) -> None:
  """Prints the table."""
  print("| L | sampler | T | written together | calls | seconds | over first hitting |")
  print("|---|---|---|---|---|---|---|")
  for length in map(int, _LENGTHS.value):
    config = transformer.TransformerConfig(
      vocab_size=_VOCAB.value + 1,
      max_length=length,
      num_layers=_LAYERS.value,
      width=_WIDTH.value,
      num_heads=_WIDTH.value // 32,
      causal=False,
    )
    model = transformer.transformer(config)
    params = transformer.unstack(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    predict = lambda params, model=model: masked_models.predictor(model, params)
    hitting = lambda params, p=predict: masked.first_hitting(p(params), LINEAR, mask=_VOCAB.value)
    reference, calls, whole = seconds(hitting, params, length, length)
    told(length, "first hitting", length, 0, calls, reference, whole, 1.0)
    for factor in map(int, _FACTORS.value):
      num_steps = factor * length
      times = np.linspace(1, 0, num_steps + 1)
      together = 1 - (1 - 1 / num_steps) ** (length - 1)
      kinds = {
        "every step": lambda params, p=predict, t=times: every_step(
          p(params), t, mask=_VOCAB.value
        ),
        "when needed": lambda params, p=predict, t=times: masked.ancestral(
          p(params), LINEAR, t, mask=_VOCAB.value
        ),
      }
      for name, algorithm in kinds.items():
        took, calls, whole = seconds(algorithm, params, length, num_steps)
        told(length, name, num_steps, together, calls, took, whole, took / reference)


def told(length, name, num_steps, together, calls, took, whole, ratio) -> None:
  """Prints a row."""
  about = "" if whole else "~"
  called = f"{calls:.0f}" if whole else ""
  print(
    f"| {length} | {name} | {num_steps} | {together:.0%} | {called} | {about}{took:.2f} | "
    f"{about}{ratio:.1f} |",
    flush=True,
  )


if __name__ == "__main__":
  app.run(main)
