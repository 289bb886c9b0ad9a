"""Trains a target, a draft model and heads, then decodes with every drafter and rule: one table.

  python -m ancestral.launch.speculative --config=configs/speculative.py --workdir=runs/speculative

The same command resumes. WORKDIR gets target/, draft/ (runs of launch/train.py), eagle/ and
confidence/ (checkpoints), and speculative.json. Prompts are held-out text; the columns are
  E           tokens per call of the target
  accepted    share of the drafts that stood
  % optimum   what was accepted, over the best that judging position by position would accept there
  v, gamma c  cost of verifying drafts, and of drafting, in calls of the target on one token
  predicted   E / (v + gamma c)
  realised    tokens per second over those of plain decoding
"""

import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..evaluation import speed
from ..models import confidence as confidence_lib
from ..models import eagle, early_exit, transformer
from ..sampling import (
  base,
  coupling,
  decode,
  draft_trees,
  drafting,
  features,
  lengths,
  logits,
  lookup,
  speculative,
  trees,
)
from ..training import checkpoint, data, drafters, loop, optimizer, step
from ..training import confidence as confidence_losses
from ..training import state as state_lib
from . import fields, flags, language, train

READS = (flags.CONFIG, flags.WORKDIR)


class Pair(NamedTuple):
  """A target and a draft model of one vocabulary, and heads of either."""

  config: fields.Config
  target: language.Experiment
  draft: language.Experiment
  eagle: eagle.FeatureModel  # of the target
  confidence: confidence_lib.Head  # of the draft model


def build(config: fields.Config) -> Pair:
  """What the configuration names.

  Raises:
    ValueError: one of its experiments is wrong, or they have different tokens.
  """
  target, draft = language.build(config.target), language.build(config.draft)
  sizes = target.tokenizer.vocab_size, draft.tokenizer.vocab_size
  if sizes[0] != sizes[1]:
    raise ValueError(f"The target has {sizes[0]} tokens, the draft {sizes[1]}: they have to agree.")
  _check(config)
  pair = Pair(
    config,
    target,
    draft,
    eagle.eagle(target.model_config, config.eagle.num_layers),
    confidence_lib.acceptance_head(
      width=draft.model_config.width, num_blocks=config.confidence.num_blocks
    ),
  )
  _trace(pair)
  return pair


def _check(config: fields.Config) -> None:
  """Raises at the first number that its field cannot mean."""
  for section in ("eagle", "confidence", "decode"):
    for name, value in config[section].items():
      numbers = value if isinstance(value, tuple) else (value,)
      bound = 1 if isinstance(numbers[0] if numbers else 1, int) else 0
      if not numbers or min(numbers) < bound or (name == "peak" and value == 0):
        rule = "above 0" if name == "peak" else f"at least {bound}"
        raise ValueError(f"config.{section}.{name} is {value}; it is {rule}.")


def _init(pair: Pair, key: jax.Array) -> dict[str, Any]:
  """Untrained params of everything, unstacked."""
  target_key, draft_key, eagle_key, confidence_key = jax.random.split(key, 4)
  tokens = jnp.zeros((1, 1), jnp.int32)
  return {
    "target": transformer.unstack(pair.target.model.init(target_key, tokens)),
    "draft": transformer.unstack(pair.draft.model.init(draft_key, tokens)),
    "eagle": transformer.unstack(pair.eagle.init(eagle_key)),
    "confidence": pair.confidence.init(confidence_key, pair.draft.model_config.width),
  }


def _trace(pair: Pair) -> None:
  """Raises where a model or a drafter cannot do what the table asks, before anything is trained."""
  c = pair.config.decode
  prompts = held_out_prompts(pair, max(c.batch_sizes))
  keys = base.row_keys(jax.random.key(0), jnp.arange(prompts.length.size))
  params = jax.eval_shape(functools.partial(_init, pair), jax.random.key(0))

  def step(entry, params, keys):
    drafter = entry.drafter(params)
    room = speed.room(prompts, drafter, c.num_steps)
    algorithm = speculative.speculative(
      pair.target.model,
      params["target"],
      drafter,
      max_length=room,
      max_new_tokens=room,
      **entry.settings,
    )
    return algorithm.step(keys, base.start(keys, algorithm, prompts))

  for entry in entries(pair).values():
    jax.eval_shape(functools.partial(step, entry), params, keys)


def fit_head(
  pair: Pair,
  workdir: str,
  name: str,
  init: Callable[[jax.Array], Any],
  loss_of: Callable[[Any], step.LossFn],
  frozen: Any,
) -> Any:
  """Trains a head on the target's text, from wherever its checkpoints stand; returns its params.

  Args:
    pair: whose config says how, in its section `name`.
    workdir: of the whole.
    name: of the head.
    init: (key) -> params.
    loss_of: of the models' params, inside jit.
    frozen: those params.
  """
  c = pair.config[name]
  schedule = optimizer.warmup_cosine(c.peak, num_steps=c.num_steps, warmup_steps=c.num_steps // 10)
  adamw = optimizer.adamw(schedule, weight_decay=0.0, clip_norm=1.0)
  begin = lambda key: state_lib.init(key, init, adamw, state_lib.no_average())
  init_key, key = jax.random.split(jax.random.key(pair.config.target.seed))
  source = pair.target
  config = fields.to_json(pair.config)
  config = {key: config[key] for key in ("target", "draft", name)} | {
    "temperature": config["decode"]["temperature"]
  }
  free = [f"{model}.{field}" for model in ("target", "draft") for field in train.FREE]

  @functools.partial(jax.jit, donate_argnums=1)
  def train_step(frozen, state, batch):
    return step.train_step(
      key,
      state,
      batch,
      loss_fn=loss_of(frozen),
      optimizer=adamw,
      averaging=state_lib.no_average(),
    )

  batches = data.batches(
    source.source, source.rows, batch_size=c.batch_size, seed=pair.config.target.seed
  )
  with checkpoint.open_manager(f"{workdir}/{name}", keep=1) as manager:
    if manager.latest_step() is None:
      state = jax.jit(begin)(init_key)
    else:
      saved = checkpoint.load_config(f"{workdir}/{name}")
      checkpoint.check_config(saved, config, ignore=set(free) - {"target.train.num_steps"})
      restored = checkpoint.restore(manager, jax.eval_shape(begin, init_key))
      state = restored.state
      data.set_state(batches, restored.data_state)
    state = loop.fit(
      state,
      batches,
      functools.partial(train_step, frozen),
      num_steps=c.num_steps,
      write=loop.Every(100, lambda done, scalars: _report(name, done, scalars)),
      evaluate=loop.Every(c.num_steps, lambda done, state: None),
      save=loop.Every(
        100,
        lambda done, state: checkpoint.save(manager, done, state, data.get_state(batches), config),
      ),
    )
  return state.params


def _report(name, done, scalars):
  values = ", ".join(f"{key} {value:.3f}" for key, value in scalars.items())
  print(f"{name}: step {done}, {values}", flush=True)


def trained(pair: Pair, workdir: str) -> dict[str, Any]:
  """Everything's params, unstacked, trained where it was not yet.

  Raises:
    loop.Interrupted: by a signal, after saving.
  """
  params = {}
  for name in ("target", "draft"):
    state = train.train(train.open_run(pair.config[name], f"{workdir}/{name}"))
    params[name] = transformer.unstack(state.average or state.params)
  model, draft = pair.target.model, pair.draft.model

  def feature_loss(params):
    return drafters.feature_prediction(model, params["target"], pair.eagle)

  def acceptance_loss(params):
    return confidence_losses.acceptance(
      pair.confidence,
      model,
      params["target"],
      draft,
      params["draft"],
      transform=logits.temperature(pair.config.decode.temperature),
      reject_weight=pair.config.confidence.reject_weight,
    )

  width = pair.draft.model_config.width
  frozen = {"target": params["target"], "draft": params["draft"]}
  head = fit_head(pair, workdir, "eagle", pair.eagle.init, feature_loss, frozen)
  params["eagle"] = transformer.unstack(head)
  params["confidence"] = fit_head(
    pair,
    workdir,
    "confidence",
    lambda key: pair.confidence.init(key, width),
    acceptance_loss,
    frozen,
  )
  return params


class Entry(NamedTuple):
  """A way to speculate."""

  drafter: Callable[[Any], drafting.Drafter]  # of the params
  settings: Mapping[str, Any] = {}  # of `speculative`


def entries(pair: Pair) -> dict[str, Entry]:
  """Every drafter, with every rule for its drafts."""
  c = pair.config.decode
  transform = logits.temperature(c.temperature)
  draft, vocab_size = pair.draft.model, pair.target.tokenizer.vocab_size
  chain = {"num_drafts": c.num_drafts, "transform": transform}
  exit_model = early_exit.early_exit(pair.target.model_config, c.exit_layer)
  widths = {"widths": sorted({0, 1, 2, 4} & set(range(c.num_most)))}

  def confident(params):
    embed = functools.partial(draft.embed, params["draft"])
    return lengths.confidence(pair.confidence, params["confidence"], embed)

  def by_draft(params):
    return drafting.by_model(draft, params["draft"], **chain)

  def adaptive(params):
    return drafting.by_model(
      draft,
      params["draft"],
      num_drafts=c.num_most,
      transform=transform,
      confidence=confident(params),
      threshold=c.threshold,
    )

  def tree(parents, siblings, rule=None):
    return Entry(
      lambda params: draft_trees.by_model(
        draft, params["draft"], parents=parents, siblings=siblings, rule=rule, transform=transform
      )
    )

  n, length = c.num_siblings, c.num_drafts
  several = trees.chains(n, length)
  return {
    "draft model, block": Entry(by_draft),
    "draft model, token by token": Entry(
      by_draft, {"verify": coupling.chain(coupling.maximal_one)}
    ),
    "draft model, sample and match": Entry(
      by_draft, {"verify": coupling.chain(coupling.sample_and_match)}
    ),
    "draft model, adaptive": Entry(adaptive, widths),
    f"{n} chains, K-SEQ": tree(several, draft_trees.independent),
    f"{n} chains, RRS": tree(several, draft_trees.independent, coupling.recursive_rejection),
    f"{n} chains without replacement, RRS": tree(several, draft_trees.without_replacement),
    f"{n} likeliest chains, match": tree(several, draft_trees.likeliest),
    "target leaving early": Entry(
      lambda params: drafting.by_model(exit_model, params["target"], **chain)
    ),
    "EAGLE head": Entry(
      lambda params: features.by_features(
        pair.target.model, params["target"], pair.eagle, params["eagle"], **chain
      )
    ),
    "prompt lookup": Entry(lambda params: lookup.ngram(vocab_size, num_drafts=c.num_most), widths),
    "longest suffix": Entry(
      lambda params: lookup.suffix(vocab_size, num_drafts=c.num_most), widths
    ),
  }


def held_out_prompts(pair: Pair, batch_size: int) -> decode.Prompts:
  """Pieces of held-out text, end to end."""
  length, needed, pieces = pair.config.decode.prompt_length, 0, []
  source = pair.target.held_out
  for index in range(len(source)):
    pieces.append(np.asarray(source[index]["tokens"]))
    needed += pieces[-1].size
    if needed >= batch_size * length:
      break
  else:
    raise ValueError(f"Held-out text has {needed} tokens, not {batch_size} prompts of {length}.")
  tokens = np.concatenate(pieces)[: batch_size * length].reshape(batch_size, length)
  return decode.Prompts(jnp.asarray(tokens, jnp.int32), jnp.full(batch_size, length, jnp.int32))


def measure(pair: Pair, params: Any, on_row: Callable[[dict], None]) -> list[dict]:
  """The table's rows, each also given to `on_row` as it is measured."""
  c, rows = pair.config.decode, []
  for batch_size in c.batch_sizes:
    prompts = held_out_prompts(pair, batch_size)
    keys = base.row_keys(jax.random.key(0), jnp.arange(batch_size))
    for name, entry in entries(pair).items():
      costs = speed.compare(
        pair.target.model,
        params,
        entry.drafter,
        keys,
        prompts,
        num_steps=c.num_steps,
        transform=logits.temperature(c.temperature),
        **entry.settings,
      )
      derived = ("verify", "draft", "predicted", "realised")
      rows.append(
        {
          "drafter and rule": name,
          "batch": batch_size,
          **costs._asdict(),
          **{field: getattr(costs, field) for field in derived},
        }
      )
      on_row(rows[-1])
  return rows


COLUMNS = {
  "drafter and rule": lambda row: row["drafter and rule"],
  "batch": lambda row: str(row["batch"]),
  "E": lambda row: f"{row['tokens']:.2f}",
  "accepted": lambda row: f"{row['accepted']:.2f}",
  "% optimum": lambda row: f"{100 * row['optimum']:.0f}",
  "v": lambda row: f"{row['verify']:.2f}",
  "gamma c": lambda row: f"{row['draft']:.2f}",
  "predicted": lambda row: f"{row['predicted']:.2f}",
  "realised": lambda row: f"{row['realised']:.2f}",
}


def line(cells: Iterable[str]) -> str:
  """A line of a markdown table."""
  return "| " + " | ".join(cells) + " |"


def main(_: list[str]) -> None:
  """Trains what is not trained, and prints the table."""
  with flags.one_line_errors():
    config, workdir = flags.required(flags.CONFIG), flags.required(flags.WORKDIR)
    pair = build(config)
  try:
    params = trained(pair, workdir)
    print(line(COLUMNS) + "\n" + line("---" for _ in COLUMNS))
    show = lambda row: print(line(cell(row) for cell in COLUMNS.values()), flush=True)
    rows = measure(pair, params, show)
  except (loop.Interrupted, KeyboardInterrupt) as stop:
    train.interrupted(workdir, stop)
  (pathlib.Path(workdir) / "speculative.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
  flags.run(main, READS)
