"""Likelihood displacement on a language small enough to look at, and whether CHES foretells it.

  python -m ancestral.benchmarks.displacement --figure=docs/figures/displacement.png

One minute. Prompts of three tokens are answered in one to four words: one of six that mean no or
of six that mean yes, a few more that go with it, and the end. A transformer of one layer and width
8, so that words of one kind have near embeddings, learns it; then

  1. DPO on one pair at a time, "No" over "Never" with nothing after; where the mass goes, as the
     chosen word is any, the likeliest or the rarest (the same one in every prompt);
  2. on one pair at a time of two answers to a prompt: rank correlation of what each score foretells
     and how far log pi(chosen) falls;
  3. on data whose chosen answers all say no and whose rejected ones do so in half of the pairs:
     all of it, or the half that a score keeps, as many steps.

Plus-minus is a 95% interval over seeds of language, model and pairs.

Reference: Razin et al. 2024, arXiv 2410.08847.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from absl import app, flags

from ancestral.models import transformer
from ancestral.training import displacement, objectives, preference, scoring

_FIGURE = flags.DEFINE_string("figure", None, "File for the figure.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Languages, and models of them.")

END = 0
ASKED = np.arange(1, 13)  # words of prompts
NO, YES = np.arange(13, 19), np.arange(19, 25)
WITH_NO, WITH_YES, WITH_BOTH = np.arange(25, 29), np.arange(29, 33), np.arange(33, 37)
PROMPT, LENGTH, VOCAB = 3, 8, 37
PAIRS, DATA, WIDTH = 90, 128, 8
OPTIMIZERS = {"Adam": (optax.adam(2e-3), 10), "gradient descent": (optax.sgd(0.02), 10)}
MODEL = transformer.transformer(
  transformer.TransformerConfig(
    vocab_size=VOCAB, max_length=LENGTH, num_layers=1, width=WIDTH, num_heads=2
  )
)


class Language(NamedTuple):
  """How prompts are answered."""

  rng: np.random.Generator
  lean: np.ndarray  # [VOCAB], of each word of a prompt towards no

  def prompt(self) -> list[int]:
    """Three words."""
    return [int(t) for t in self.rng.choice(ASKED, PROMPT)]

  def answer(self, prompt: list[int], no: bool | None = None) -> list[int]:
    """A word that says no or yes, up to three that go with it, and the end."""
    if no is None:
      no = self.rng.random() < 1 / (1 + np.exp(-self.lean[prompt].sum()))
    often = 1 / np.arange(1, 7) ** 0.7
    words = [int(self.rng.choice(NO if no else YES, p=often / often.sum()))]
    while len(words) < 4 and self.rng.random() < 0.5:
      own = WITH_NO if no else WITH_YES
      words.append(int(self.rng.choice(own if self.rng.random() < 0.7 else WITH_BOTH)))
    return [*words, END]


def rows(prompts, answers) -> dict[str, jax.Array]:
  """Rows as training reads them, [B, LENGTH]."""
  tokens = np.zeros((len(prompts), LENGTH + 1), np.int32)
  mask = np.zeros((len(prompts), LENGTH), np.float32)
  for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
    tokens[i, : len(prompt) + len(answer)] = prompt + answer
    mask[i, len(prompt) - 1 : len(prompt) + len(answer) - 1] = 1
  made = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask, "weight": mask}
  return jax.tree.map(jnp.asarray, made)


@jax.jit
def log_prob(params, batch) -> jax.Array:
  """log pi(answer | prompt), [B]."""
  return scoring.scores(MODEL, params, batch).log_prob.sum(-1)


@jax.jit
def pretrained(key, batch):
  """Parameters after 600 steps on 128 of the rows."""
  optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 600))
  params = MODEL.init(key, batch["tokens"][:1])

  def step(carry, key):
    params, state = carry
    pick = jax.random.randint(key, (128,), 0, len(batch["tokens"]))
    part = jax.tree.map(lambda x: x[pick], batch)
    gradient = jax.grad(lambda p: -jnp.mean(log_prob(p, part)))(params)
    updates, state = optimizer.update(gradient, state)
    return (optax.apply_updates(params, updates), state), None

  keys = jax.random.split(jax.random.fold_in(key, 1), 600)
  return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


@functools.partial(jax.jit, static_argnames=("optimizer", "steps"))
def tuned(params, chosen, rejected, weight, optimizer, steps: int):
  """Parameters after DPO on the pairs, all at every step."""
  loss_fn = objectives.of_pairs(MODEL, objectives.log_ratios(preference.dpo))
  batch = {"chosen": chosen, "rejected": rejected, "weight": weight}
  for name in ("chosen", "rejected"):
    reference = scoring.scores(MODEL, params, batch[name]).log_prob
    batch[name] = {**batch[name], "reference_log_prob": reference}

  def step(carry, _):
    params, state = carry
    loss = lambda p: jnp.sum(loss_fn(None, p, batch)[0][0]) / jnp.sum(weight)
    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return (optax.apply_updates(params, updates), state), None

  return jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)[0][0]


@jax.jit
def no_mass(params, batch) -> jax.Array:
  """The probability that an answer's first word says no, [B]."""
  hidden = MODEL.trunk(params, MODEL.embed(params, batch["tokens"]))[0]
  return jax.nn.softmax(MODEL.readout(params, hidden[:, PROMPT - 1]))[:, NO].sum(-1)


@functools.partial(jax.jit, static_argnames=("optimizer", "steps"))
def one_at_a_time(params, chosen, rejected, optimizer, steps: int):
  """Of each pair trained upon alone: changes of log pi of both and of the mass of no, [3, P]."""

  def one(pair):
    chosen, rejected = jax.tree.map(lambda x: x[None], pair)
    after = tuned(params, chosen, rejected, jnp.ones(1), optimizer, steps)
    seen = lambda p: (log_prob(p, chosen), log_prob(p, rejected), no_mass(p, chosen))
    return jnp.stack([(a - b)[0] for a, b in zip(seen(after), seen(params), strict=True)])

  return jax.vmap(one, out_axes=1)((chosen, rejected))


@jax.jit
def foretold(params, chosen, rejected) -> dict[str, jax.Array]:
  """Scores of pairs, [P], each high where log pi(chosen) is to fall."""
  of = lambda similarity: displacement.of_pairs(MODEL, params, chosen, rejected, similarity)

  def rate(pair):
    one, other = (functools.partial(log_prob, batch=jax.tree.map(lambda x: x[None], side))
                  for side in pair)  # fmt: skip
    return -displacement.chosen_rate(one, other, params)[0]

  def cosine(c, r, c_mask, r_mask):
    ends = [h[jnp.arange(len(h)), jnp.argmax(m * jnp.arange(LENGTH), -1)]
            for h, m in ((c, c_mask), (r, r_mask))]  # fmt: skip
    norms = [jnp.linalg.norm(end, axis=-1) for end in ends]
    return jnp.sum(ends[0] * ends[1], axis=-1) / (norms[0] * norms[1])

  return {
    "CHES": of(displacement.ches),
    "CHES of means": of(displacement.mean_ches),
    "cosine of last states": of(cosine),
    "minus the gradient's rate": jax.lax.map(rate, (chosen, rejected)),
    "chosen answer's length": chosen["mask"].sum(-1),
    "-log pi(chosen)": -log_prob(params, chosen),
  }


def scores_of(params, answers, batches) -> dict[str, np.ndarray]:
  """`foretold`, and minus the edit distance over the longer length."""
  found = {name: np.asarray(x) for name, x in foretold(params, *batches).items()}
  near = [-displacement.edit_distance(a, b) / max(len(a), len(b)) for a, b in answers]
  return found | {"minus edit distance": np.array(near)}


class World(NamedTuple):
  """A language and a model of it."""

  language: Language
  params: object

  def pairs(self, num: int, sides) -> tuple[list, list, tuple]:
    """Prompts, pairs of different answers (each no, yes, or either if None), and their rows."""
    prompts, answers = [], []
    while len(prompts) < num:
      prompt = self.language.prompt()
      pair = [self.language.answer(prompt, side) for side in sides(len(prompts))]
      if pair[0] != pair[1]:
        prompts.append(prompt)
        answers.append(pair)
    return prompts, answers, tuple(rows(prompts, side) for side in zip(*answers, strict=True))


def world(seed: int) -> World:
  """One of them."""
  rng = np.random.default_rng(seed)
  language = Language(rng, rng.normal(scale=0.7, size=VOCAB))
  prompts = [language.prompt() for _ in range(8000)]
  batch = rows(prompts, [language.answer(prompt) for prompt in prompts])
  return World(language, pretrained(jax.random.key(seed), batch))


def bare(here: World) -> dict[str, np.ndarray]:
  """One word over another and nothing after, all pairs: changes [3] by the words' kinds."""
  found = {}
  kinds = {"no over no": (NO, NO), "no over yes": (NO, YES)}
  kinds |= {"likeliest no over a no": (NO[:1], NO), "rarest no over a no": (NO[-1:], NO)}
  for name, sides in kinds.items():
    words = [(int(a), int(b)) for a in sides[0] for b in sides[1] if a != b]
    answers = [([a, END], [b, END]) for a, b in itertools.islice(itertools.cycle(words), PAIRS)]
    prompts = [here.language.prompt() for _ in answers]
    batches = [rows(prompts, side) for side in zip(*answers, strict=True)]
    changes = np.asarray(one_at_a_time(here.params, *batches, *OPTIMIZERS["Adam"]))
    found[name] = np.append(changes.mean(1), np.mean(changes[0] < 0))
  return found


def single(here: World) -> tuple[dict, dict]:
  """Rank correlations by optimizer and score; the points of the figure."""
  _, answers, batches = here.pairs(PAIRS, lambda _: (None, None))
  scores = scores_of(here.params, answers, batches)
  found, fallen = {}, {}
  for name, (optimizer, steps) in OPTIMIZERS.items():
    fallen[name] = -np.asarray(one_at_a_time(here.params, *batches, optimizer, steps))[0]
    for score, values in scores.items():
      found[score, name] = scipy.stats.spearmanr(values, fallen[name]).statistic
    found["share that falls", name] = np.mean(fallen[name] > 0)
  return found, {"fallen": fallen["Adam"], **scores}


def filtered(here: World, steps: int = 50) -> dict[str, np.ndarray]:
  """By filter: log pi(chosen), of all and of those kept; mass of no; pairs that are in order."""
  _, answers, batches = here.pairs(DATA, lambda i: (True, i % 2 == 0))
  scores = scores_of(here.params, answers, batches)
  half = functools.partial(displacement.least_similar, share=0.5)
  names = "CHES", "CHES of means", "minus edit distance", "minus the gradient's rate"
  kept = {"all pairs": jnp.ones(DATA, bool)}
  kept["half, at random"] = half(jnp.asarray(here.language.rng.random(DATA)))
  kept |= {f"half, lowest {name}": half(jnp.asarray(scores[name])) for name in names}
  kept["half, highest CHES of means"] = half(-jnp.asarray(scores["CHES of means"]))
  fresh = here.pairs(DATA, lambda _: (None, None))[2][0]
  alike = np.arange(DATA) % 2 == 0
  found = {}
  for name, keep in kept.items():
    weight = keep.astype(jnp.float32)
    after = tuned(here.params, *batches, weight, OPTIMIZERS["Adam"][0], steps)
    change = [np.asarray(log_prob(after, b) - log_prob(here.params, b)) for b in batches]
    mass = [float(no_mass(p, fresh).mean()) for p in (here.params, after)]
    own, right = change[0][np.asarray(keep)].mean(), np.mean(change[0] > change[1])
    share = alike[np.asarray(keep)].mean()
    found[name] = np.array([share, change[0].mean(), own, mass[1] - mass[0], right])
  return found


def interval(values) -> str:
  """Mean, and 1.96 standard errors over seeds."""
  values = np.asarray(values)
  return f"{values.mean():.3f} ± {1.96 * values.std(ddof=1) / np.sqrt(len(values)):.3f}"


def table(heads: str, rows: dict[str, list]) -> None:
  """Prints rows of seeds [S, columns]."""
  print(f"\n| {heads} |\n" + "|---" * (heads.count("|") + 1) + "|")
  for name, by_seed in rows.items():
    print(f"| {name} | " + " | ".join(map(interval, np.array(by_seed).T)) + " |", flush=True)


def draw_figure(points: list[dict], path: str) -> None:
  """How far the chosen answer falls by three scores."""
  import matplotlib.pyplot as plt

  names = "CHES", "CHES of means", "minus the gradient's rate"
  figure, axes = plt.subplots(1, len(names), figsize=(11, 3.2), sharey=True)
  for axis, name in zip(axes, names, strict=True):
    for i, one in enumerate(points):
      axis.plot(one[name], one["fallen"], ".", color=f"C{i}", ms=4)
    axis.axhline(0, color="0.6", lw=0.7)
    axis.set_xlabel(name)
  axes[0].set_ylabel("fall of log pi(chosen)")
  figure.tight_layout()
  figure.savefig(path, dpi=130)


def main(_) -> None:
  """Prints the tables."""
  worlds = [world(seed) for seed in range(_SEEDS.value)]
  by_seed = lambda found: {name: [one[name] for one in found] for name in found[0]}
  heads = "one word | log pi(chosen) | log pi(rejected) | mass of no | pairs whose chosen falls"
  table(heads, by_seed([bare(here) for here in worlds]))
  found, points = zip(*[single(here) for here in worlds], strict=True)
  names = dict.fromkeys(name for name, _ in found[0])
  by_name = {name: [[one[name, o] for o in OPTIMIZERS] for one in found] for name in names}
  table("rank correlation with the fall | " + " | ".join(OPTIMIZERS), by_name)
  heads = "trained on | no over no | log pi(chosen), all | of those kept | mass of no | in order"
  table(heads, by_seed([filtered(here) for here in worlds]))
  if _FIGURE.value:
    draw_figure(points, _FIGURE.value)


if __name__ == "__main__":
  app.run(main)
