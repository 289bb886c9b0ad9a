"""Does an adaptive draft length pay? The learned policy beside fixed lengths and oracles.

  python -m ancestral.launch.train --config=configs/text.py --workdir=runs/target
  python -m ancestral.launch.train --config=configs/text.py --workdir=runs/draft \\
      --config.model.num_layers=1
  python -m ancestral.benchmarks.draft_lengths --target=runs/target --draft=runs/draft

Trains the acceptance head on the target's training texts. Then, at random places of texts that the
target continues from held-out prompts, drafts 16 tokens, whose acceptances are known. Settings are
chosen on half of the texts, the table is of the other half; intervals are of 95%, by resampling its
texts. Costs are in plain steps of the target: a draft c, verifying k drafts 1 + slope k.

The table compares rules at the same places. It flatters all of them, adaptive ones most: a long
round is one round, however many places it covers, so rounds begin where drafting is hard more often
than a random place is hard. The loop, which follows, is what counts.
"""

import functools
import itertools
import timeit
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from ancestral.evaluation import coverage
from ancestral.launch import experiment as experiment_lib
from ancestral.models import base as models
from ancestral.models import confidence as heads
from ancestral.sampling import base as sampling
from ancestral.sampling import coupling, decode, drafting, lengths, speculative
from ancestral.sampling import logits as logits_lib
from ancestral.training import confidence, data, optimizer, state, step

_TARGET = flags.DEFINE_string("target", None, "Workdir of the target.", required=True)
_DRAFT = flags.DEFINE_string("draft", None, "Workdir of the draft model.", required=True)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Of both laws.")
_DRAFT_COSTS = flags.DEFINE_multi_float("draft_cost", [0.1, 0.3], "c; a table each.")
_SLOPE = flags.DEFINE_float("verify_slope", 0.02, "Verifying k drafts costs 1 + slope k.")
_MEASURE = flags.DEFINE_bool("measure", False, "A table of the costs of this machine, at batch 1.")
_STEPS = flags.DEFINE_integer("num_steps", 200, "Of training, of 16 rows.")
_TEXTS = flags.DEFINE_integer("num_texts", 192, "Held-out prompts.")
_PLACES = flags.DEFINE_integer("num_places", 12, "Rounds of each text.")
_LOOP_TOKENS = flags.DEFINE_integer("loop_tokens", 128, "Tokens of each text in the loop; 0: none.")

MOST, PROMPT, BATCH = 16, 48, 64
HEAD = heads.acceptance_head(width=128)
OWN = "draft's probability, product"
WEIGHTS = {"weight 1": 1.0, "weight 6": 6.0}  # of refusals, in the loss
COLUMNS = ("policy", "setting", "drafts", "tokens", "tokens per cost", "over best fixed")


class Network(NamedTuple):
  """A language model and its parameters."""

  model: models.LanguageModel
  params: models.Params


def network_of(workdir):
  """The experiment, and its trained model."""
  experiment, params, _ = experiment_lib.restore_params(None, workdir)
  return experiment, Network(experiment.model, params)


def trained(experiment, target, draft, transform):
  """Params of a head for each weight, trained on the same drafts."""
  schedule = optimizer.warmup_cosine(2e-3, num_steps=_STEPS.value, warmup_steps=_STEPS.value // 20)
  adam, averaging = optimizer.adamw(schedule, weight_decay=0.01), state.no_average()

  def loss_of(weight, target_params, draft_params):
    pair = (target.model, target_params, draft.model, draft_params)
    return confidence.acceptance(HEAD, *pair, transform=transform, reject_weight=weight)

  @jax.jit
  def update(states, batch, *params):
    def one(old, weight):  # what does not depend on the weight is computed once
      settings = {"loss_fn": loss_of(weight, *params), "optimizer": adam, "averaging": averaging}
      return step.train_step(jax.random.key(1), old, batch, **settings)[0]

    return jax.vmap(one)(states, jnp.array(list(WEIGHTS.values())))

  width = draft.model.embed(draft.params, jnp.zeros((), jnp.int32)).size
  fresh = state.init(jax.random.key(0), lambda key: HEAD.init(key, width), adam, averaging)
  states = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(WEIGHTS)), fresh)
  batches = data.batches(experiment.source, experiment.rows, batch_size=16)
  for batch in itertools.islice(batches, _STEPS.value):
    states = update(states, batch, target.params, draft.params)
  return {w: jax.tree.map(lambda leaf, i=i: leaf[i], states.params) for i, w in enumerate(WEIGHTS)}


def prompts_of(experiment):
  """[P, PROMPT] from random places of the held-out texts."""
  rng = np.random.default_rng(0)
  texts = [experiment.held_out[i]["tokens"] for i in range(len(experiment.held_out))]
  texts = [text for text in texts if len(text) >= PROMPT]
  chosen = rng.choice(len(texts), _TEXTS.value)
  starts = [rng.integers(len(texts[text]) - PROMPT + 1) for text in chosen]
  cuts = [texts[t][start : start + PROMPT] for t, start in zip(chosen, starts, strict=True)]
  return decode.Prompts(jnp.array(cuts, jnp.int32), jnp.full(len(cuts), PROMPT, jnp.int32))


def continued(experiment, target, prompts, transform):
  """Tokens [P, S] that the target draws, and where each row ends."""
  room = experiment.model_config.max_length - 1 - MOST - PROMPT
  generate = functools.partial(decode.generate, target.model, max_new_tokens=room)
  sample = jax.jit(functools.partial(generate, transform=transform))
  keys = sampling.row_keys(jax.random.key(2), jnp.arange(prompts.length.size))
  made = jax.device_get(sample(target.params, keys, prompts))
  return made.tokens, made.length


def reader(target, draft, transform):
  """A jitted (params of target, draft and heads, keys, prompts) -> what is known of drafts."""

  @jax.jit
  def read(target_params, draft_params, head_params, keys, prompts):
    drafter = drafting.by_model(draft.model, draft_params, num_drafts=MOST, transform=transform)
    padded = jnp.pad(prompts.tokens, ((0, 0), (0, MOST)))
    context = logits_lib.Context(padded, prompts.length, prompts.length)
    drafts, _ = drafter.draft(keys, context, drafter.init(prompts, padded.shape[1]))
    places = prompts.length[:, None] + jnp.arange(MOST)[None, :]
    whole = padded.at[jnp.arange(keys.size)[:, None], places].set(drafts.tokens)
    before = lambda hidden: jnp.take_along_axis(hidden, places[:, :, None] - 1, axis=1)
    own = before(models.apply(draft.model, draft_params, whole)[0])
    hidden = before(models.apply(target.model, target_params, whole)[0])
    law = lambda logits: transform.apply(logits, context, ())
    laws = jax.vmap(law, in_axes=1, out_axes=1)(target.model.readout(target_params, hidden))
    log_q, log_p = coupling.log_law(drafts.logits), coupling.log_law(laws)
    judged = coupling.maximal_one(drafts.tokens[..., None], log_q, log_p)
    embed = functools.partial(draft.model.embed, draft_params)
    of = heads.features(own, drafts.tokens, drafts.logits, embed)
    learned = {w: jax.nn.sigmoid(HEAD.logit(params, of)) for w, params in head_params.items()}
    return {"accept": judged.accept[..., 0], "q": jnp.exp(of.log_prob), "H": of.entropy, **learned}

  return read


def rounds(target, draft, head_params, transform, tokens, ends):
  """Arrays [P, places, MOST] of each round's drafts, by name."""
  rng, read = np.random.default_rng(1), reader(target, draft, transform)
  at = np.stack([rng.choice(np.arange(PROMPT, end), _PLACES.value, False) for end in ends])
  rows, length = np.repeat(tokens, _PLACES.value, axis=0), at.reshape(-1)
  keys = sampling.row_keys(jax.random.key(3), jnp.arange(len(rows)))
  made = []
  for some in np.split(np.arange(len(rows)), np.arange(BATCH, len(rows), BATCH)):
    prompts = decode.Prompts(jnp.asarray(rows[some]), jnp.asarray(length[some], jnp.int32))
    made.append(read(target.params, draft.params, head_params, keys[some], prompts))
  joined = jax.tree.map(lambda *parts: np.concatenate(parts).astype(np.float64), *made)
  return jax.tree.map(lambda leaf: leaf.reshape(*at.shape, MOST), joined)


def policies(found, first, c, v):
  """{name: (k or h, how many drafts each round makes [P, places])}, chosen on the `first` texts."""
  accept = found["accept"]
  whole = np.ones(accept.shape[:-1], int)
  best = np.argmax([lengths.rate(accept[first], k * whole[first], c, v) for k in range(MOST + 1)])
  made = {"best fixed": (best, best * whole)}
  made |= {f"fixed {k}": (k, k * whole) for k in (0, 1, 2, 3, 4, 6, 8, 12, 16)}
  product = functools.partial(np.cumprod, axis=-1)
  survivals = {f"learned, {w}": product(found[w]) for w in WEIGHTS}
  survivals[OWN] = product(found["q"])
  survivals["draft's probability, each"] = np.minimum.accumulate(found["q"], axis=-1)
  survivals["draft's entropy, sum"] = product(np.exp(-found["H"]))
  survivals["oracle of each draft"] = product(accept)
  for name, survival in survivals.items():
    h = lengths.best_threshold(survival[first], accept[first], c, v)
    made[f"{name}, best h"] = (h, lengths.num_drafted(survival, h))
    if name.startswith("learned"):
      made[f"{name}, paper's h"] = (0.3, lengths.num_drafted(survival, 0.3))
  values, counts = np.unique(np.round(accept[first], 3), return_counts=True)
  h = lengths.optimal_stopping(values, counts / counts.sum(), c, v).thresholds
  made["oracle of each draft, h of theory"] = (h[0], lengths.num_drafted(product(accept), h))
  made["hindsight"] = (np.nan, lengths.hindsight(accept, c, v))
  return made


def compared(sums, base):
  """Cells: tokens per cost, and its difference to the base's, of sums [P, 2] of each text."""
  ratio = lambda sums: sums[..., 0].sum() / sums[..., 1].sum()
  interval = functools.partial(coverage.bootstrap_interval, np.random.default_rng(0))
  low, high = interval(sums, ratio)
  gain = lambda both: ratio(both[:, 0]) / ratio(both[:, 1]) - 1
  both = np.stack([sums, base], axis=1)
  least, most = interval(both, gain)
  difference = f"{100 * gain(both):+.1f}% [{100 * least:+.1f}, {100 * most:+.1f}]"
  return f"{ratio(sums):.3f} [{low:.3f}, {high:.3f}]", difference


def show(columns, rows):
  """Prints a Markdown table."""
  print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
  for row in rows:
    print("| " + " | ".join(row) + " |", flush=True)


def table(found, c, slope):
  """Prints the policies' table; returns them."""
  v, first = 1 + slope * np.arange(MOST + 1), np.arange(_TEXTS.value) < _TEXTS.value // 2
  made, rows, base = policies(found, first, c, v), [], None
  for name, (setting, number) in made.items():
    tokens, cost = lengths.outcome(found["accept"][~first], number[~first], c, v)
    sums = np.stack([tokens, cost], axis=-1).sum(axis=1)
    base = sums if base is None else base
    means = (f"{setting:.4g}", f"{number[~first].mean():.2f}", f"{tokens.mean():.2f}")
    rows.append((name, *means, *compared(sums, base)))
  print(f"\nc = {c:.3f}, v(k) = 1 + {slope:.3f} k")
  show(COLUMNS, rows)
  return made


def decoded(target, draft, head_params, transform, prompts, num_drafts, h, weight):
  """Samples of the decoding loop, with the head of that weight, OWN, or, if None, all K drafts."""
  keys = sampling.row_keys(jax.random.key(4), jnp.arange(prompts.length.size))

  @jax.jit
  def sample(target_params, draft_params, head_params, keys, prompts):
    embed = functools.partial(draft.model.embed, draft_params)
    learned = head_params and lengths.confidence(HEAD, head_params, embed)
    stops_by = lengths.own_probability if weight == OWN else learned
    settings = {"num_drafts": num_drafts, "confidence": stops_by, "threshold": h}
    drafter = drafting.by_model(draft.model, draft_params, transform=transform, **settings)
    settings = {"max_new_tokens": _LOOP_TOKENS.value, "widths": (1, 2, 4, 8) if stops_by else ()}
    settings |= {"verify": coupling.chain(coupling.maximal_one), "transform": transform}
    return speculative.generate(target.model, target_params, drafter, keys, prompts, **settings)

  params = (target.params, draft.params, head_params.get(weight))
  return jax.device_get(sample(*params, keys, prompts))


def loop_table(target, draft, head_params, transform, prompts, made, c, slope):
  """Prints what the loop makes at the settings that the first half chose."""
  second = jax.tree.map(lambda leaf: leaf[_TEXTS.value // 2 :], prompts)
  chosen = {f"learned, {w}, best h": (MOST, w) for w in WEIGHTS}
  chosen |= {f"{OWN}, best h": (MOST, OWN)}
  chosen = {"best fixed": (max(made["best fixed"][0], 1), None)} | chosen
  rows, base = [], None
  for name, (num_drafts, weight) in chosen.items():
    setting = made[name][0] if weight else num_drafts
    of = decoded(target, draft, head_params, transform, second, int(num_drafts), setting, weight)
    new, calls = of.length - of.prompt_length, of.num_calls.sum()
    sums = np.stack([new, of.num_calls + (c + slope) * of.num_drafted], axis=-1)
    base = sums if base is None else base
    means = (f"{setting:.4g}", f"{of.num_drafted.sum() / calls:.2f}", f"{new.sum() / calls:.2f}")
    rows.append((name, *means, *compared(sums, base)))
  print("\nThe loop")
  show(COLUMNS, rows)


def calibration(found):
  """Prints how well the heads predict acceptance on the second half."""
  accept, rows = found["accept"][_TEXTS.value // 2 :].reshape(-1), []
  for w in WEIGHTS:
    f = found[w][_TEXTS.value // 2 :].reshape(-1)
    gaps = np.abs(np.bincount((f * 20).astype(int), f - accept)).sum() / f.size
    explained = 1 - np.mean((f - accept) ** 2) / np.var(accept)
    rows.append((w, *(f"{x:.3f}" for x in (np.mean(accept), np.mean(f), gaps, explained))))
  show(("head", "mean acceptance", "mean confidence", "calibration error", "R^2"), rows)


def measured(target, draft):
  """(c, slope) of this machine: the best of 50 calls each, on one row that holds 128 tokens."""

  def seconds(network, width):
    cache = network.model.init_cache(network.params, 1, 256)._replace(length=jnp.full(1, 128))
    read, tokens = (
      jax.jit(functools.partial(models.apply, network.model)),
      jnp.zeros((1, width), "i4"),
    )
    call = lambda: jax.block_until_ready(read(network.params, tokens, cache))
    call()
    return min(timeit.repeat(call, number=1, repeat=50))

  plain, widths = seconds(target, 1), np.array([1, 2, 4, 8, 16])
  extra = np.array([seconds(target, int(width) + 1) for width in widths]) / plain - 1
  return seconds(draft, 1) / plain, float(extra @ widths / (widths @ widths))


def main(_):
  """Prints the tables."""
  logging.set_verbosity(logging.ERROR)  # of checkpoints
  experiment, target = network_of(_TARGET.value)
  _, draft = network_of(_DRAFT.value)
  transform = logits_lib.temperature(_TEMPERATURE.value)
  head_params = trained(experiment, target, draft, transform)
  prompts = prompts_of(experiment)
  texts = continued(experiment, target, prompts, transform)
  found = rounds(target, draft, head_params, transform, *texts)
  calibration(found)
  costs = [(c, _SLOPE.value) for c in _DRAFT_COSTS.value]
  for c, slope in costs + ([measured(target, draft)] if _MEASURE.value else []):
    made = table(found, c, slope)
    if _LOOP_TOKENS.value:
      loop_table(target, draft, head_params, transform, prompts, made, c, slope)


if __name__ == "__main__":
  app.run(main)
