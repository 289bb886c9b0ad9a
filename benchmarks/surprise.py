"""Does Mirostat hold the surprise of a text where top-k and top-p let it drift?

  python -m ancestral.benchmarks.surprise             # tables and figure, 3 minutes of CPU

The source is a law over V = 4,000 tokens whose closed form is known: Zipf's with exponent s, and a
share w more on the likeliest token. Both wander with position, once in 1,000 tokens, from (s, w) =
(0.75, 0.24), where its entropy is highest, to (1.00, 0.30); the text's first token sets the phase.
Without w, few targets are feasible throughout: of a pure Zipf law, the likeliest token has 3.8 bits
at s = 0.9, and all of s = 1.4 have 5.1 in the mean.

Four texts for each target, 2,200 tokens each; the first 200 are dropped, and surprise, -log2 p
under the source itself, is averaged over windows of 200 tokens. A target is feasible if it lies, at
every position, between the surprise of the likeliest token and the mean surprise untruncated.
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ancestral.models import base, toy
from ancestral.sampling import base as sampling
from ancestral.sampling import decode, feedback, logits, truncation

_FIGURE = flags.DEFINE_string(
  "figure",
  str(pathlib.Path(__file__).resolve().parents[1] / "docs" / "figures" / "surprise.png"),
  "File for the figure; empty for none.",
)

VOCAB_SIZE = 4000
PERIOD = 1000  # tokens
WINDOW = 200
NUM_WINDOWS = 10
NUM_TEXTS = 4
TAUS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
Make = Callable[[jax.Array], logits.LogitsTransform]  # of tau [B]


class Study(NamedTuple):
  """Surprise in bits under the source."""

  name: str
  window_means: np.ndarray  # [taus, texts, windows]
  moving: np.ndarray  # [taus, positions], the moving mean of each target's first text


def source_logits(log_rank: jax.Array, phase: jax.Array) -> jax.Array:
  """log p [V] at a phase, in cycles, of the wandering."""
  sure = (1 + jnp.sin(2 * jnp.pi * phase)) / 2
  exponent, share = 0.75 + 0.25 * sure, 0.24 + 0.06 * sure
  zipf = jax.nn.log_softmax(-exponent * log_rank) + jnp.log1p(-share)
  return zipf.at[0].set(jnp.logaddexp(zipf[0], jnp.log(share)))


def source() -> base.LanguageModel:
  """The wandering source; params are log ranks [V]."""

  def next_logits(log_rank, tokens, t):
    return source_logits(log_rank, t / PERIOD + tokens[0] / VOCAB_SIZE)

  return toy.from_conditionals(
    lambda key: jnp.log(jnp.arange(1, VOCAB_SIZE + 1, dtype=jnp.float32)), VOCAB_SIZE, next_logits
  )


def band(transform: logits.LogitsTransform) -> tuple[float, float]:
  """Feasible targets: the highest surprise of the likeliest token, the lowest mean of `transform`.

  Means are of the source's surprise under the transformed law.
  """
  log_rank = jnp.log(jnp.arange(1, VOCAB_SIZE + 1, dtype=jnp.float32))
  model = jax.vmap(source_logits, in_axes=(None, 0))(log_rank, jnp.arange(64) / 64)
  law = jax.nn.softmax(transform.apply(model, None, ()), axis=-1)
  surprise = -model / np.log(2)
  return float(jnp.max(surprise[:, 0])), float(jnp.min(jnp.sum(law * surprise, axis=-1)))


def surprises(make: Make, taus: tuple[float, ...], seed: int = 0) -> np.ndarray:
  """Bits of each drawn token under the source, [taus, texts, tokens], burn-in included."""
  model = source()
  rows = len(taus) * NUM_TEXTS
  first = jnp.tile(jnp.arange(NUM_TEXTS) * VOCAB_SIZE // NUM_TEXTS, len(taus))
  prompts = decode.Prompts(first[:, None].astype(jnp.int32), jnp.ones(rows, jnp.int32))
  keys = sampling.row_keys(jax.random.key(seed), jnp.arange(rows))

  @jax.jit
  def sample(params, tau, keys, prompts):
    return decode.generate(
      model, params, keys, prompts, max_new_tokens=(1 + NUM_WINDOWS) * WINDOW, transform=make(tau)
    ).model_log_prob

  log_prob = sample(
    model.init(jax.random.key(0), None), jnp.repeat(jnp.array(taus), NUM_TEXTS), keys, prompts
  )
  return -np.asarray(log_prob, np.float64).reshape(len(taus), NUM_TEXTS, -1) / np.log(2)


def study(name: str, make: Make, taus: tuple[float, ...] = TAUS) -> Study:
  """Windows after burn-in, and a moving mean to look at."""
  bits = surprises(make, taus)
  means = bits[:, :, WINDOW:].reshape(len(taus), NUM_TEXTS, NUM_WINDOWS, WINDOW).mean(-1)
  kernel = np.full(WINDOW, 1 / WINDOW)
  moving = np.stack([np.convolve(row[0], kernel, mode="valid") for row in bits])
  return Study(name, means, moving)


def chained(*before: logits.LogitsTransform) -> Callable[[Make], Make]:
  """A maker whose transform stands behind others."""
  return lambda make: lambda tau: logits.chain(*before, make(tau))


def print_study(result: Study, feasible: tuple[float, float]) -> None:
  """A row per target."""
  print(f"\n### {result.name}: feasible from {feasible[0]:.2f} to {feasible[1]:.2f} bits\n")
  print("| tau | feasible | mean | mean deviation of windows | largest |")
  print("|---|---|---|---|---|")
  for tau, means in zip(TAUS, result.window_means, strict=True):
    deviation = np.abs(means - tau)
    inside = "yes" if feasible[0] <= tau <= feasible[1] else "no"
    figures = (means.mean(), deviation.mean(), deviation.max())
    print(f"| {tau:g} | {inside} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |")


def draw(path: str, held: Study, drifting: list[Study], scored: list[Study]) -> None:
  """Left: surprise along one text. Right: where each variant's mean surprise lands."""
  from matplotlib import figure as figures  # no global state, so no pyplot
  from matplotlib.backends import backend_agg
  from PIL import Image

  figure = figures.Figure(figsize=(8, 3.2), dpi=100)
  canvas = backend_agg.FigureCanvasAgg(figure)
  left, right = figure.subplots(1, 2, width_ratios=(2, 1))
  token = np.arange(held.moving.shape[1])[::10]
  for result, colour in zip(drifting, ("tab:orange", "tab:red"), strict=True):
    left.plot(token, result.moving[0, ::10], color=colour, lw=1.2, label=result.name)
  for i in range(1, 6):
    label = f"{held.name}, tau = 2 to 6" if i == 1 else None
    left.plot(token, held.moving[i, ::10], color="tab:blue", lw=1, label=label)
  left.set(xlabel="token", ylabel="bits, mean of 200 tokens", ylim=(1.4, 8.8))
  left.legend(fontsize=7, ncols=3, loc="upper center", frameon=False)
  right.plot(TAUS[1:6], TAUS[1:6], color="0.7", lw=4)
  for result, style in zip(scored, ("o-", "s-", "^-"), strict=True):
    right.plot(TAUS[1:6], result.window_means[1:6].mean((1, 2)), style, ms=4, label=result.name)
  right.set(xlabel="tau, bits", ylabel="mean surprise under the model, bits")
  right.legend(fontsize=7, frameon=False)
  for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
  figure.tight_layout()
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  canvas.draw()
  pixels = np.asarray(canvas.buffer_rgba())[:, :, :3]
  Image.fromarray(pixels.copy()).quantize(32).save(path, optimize=True)  # a third of the bytes


def main(argv):
  """Runs the study."""
  del argv
  before = (logits.temperature(1.3), truncation.top_k(1000), truncation.top_p(0.98))
  behind = chained(*before)
  alone, after = band(logits.chain()), band(logits.chain(*before))
  chain_name = "behind temperature 1.3, top-k 1,000, top-p 0.98"
  first, second = feedback.mirostat, feedback.mirostat_v2
  held = study("Mirostat 2", second)
  print_study(held, alone)
  print_study(study("Mirostat 1", first), alone)
  print_study(study(f"Mirostat 1 {chain_name}", behind(first)), after)
  print_study(study(f"Mirostat 2 {chain_name}", behind(second)), after)
  print_study(study("Mirostat 1, eta = 0.1", lambda tau: first(tau, 0.1)), alone)
  slow = study("Mirostat 2, eta = 0.1", lambda tau: second(tau, 0.1))
  print_study(slow, alone)
  scored = [
    slow,
    study("Mirostat 1, llama.cpp's", feedback.mirostat_truncated),
    study("Mirostat 2, llama.cpp's", feedback.mirostat_v2_truncated),
  ]
  for result in scored[1:]:
    print_study(result, alone)
  drifting = [
    study("top-k 200", lambda tau: truncation.top_k(200), (0.0,)),
    study("top-p 0.8", lambda tau: truncation.top_p(0.8), (0.0,)),
  ]
  print("\n### Without feedback\n\n| transform | mean | lowest window | highest window |")
  print("|---|---|---|---|")
  for result in drifting:
    means = result.window_means
    print(f"| {result.name} | {means.mean():.3f} | {means.min():.3f} | {means.max():.3f} |")
  if _FIGURE.value:
    draw(_FIGURE.value, held, drifting, scored)


if __name__ == "__main__":
  app.run(main)
