"""What superposed decoding gives up, and what it saves, on a small trained model.

  python -m ancestral.launch.train --config=configs/text.py --workdir=runs/text \\
      --config.data.folder=FOLDER --config.data.pattern="*.txt"
  python -m ancestral.benchmarks.superposed --workdir=runs/text --json=out.json

Prompts are cut from the run's held-out texts, n-grams are counted in its training texts. Three
tables. Drafts: their perplexity under the model, on average and for the best of each prompt's, how
much they differ, and how far the best agrees with the text itself. Linearity: the law of the
superposed pass against the mixture, by the same weights, of the laws of the drafts read apart.
Speed: seconds for all drafts of all prompts, the best of repetitions that alternate between the
systems; also for a random model of 30M parameters, where the model and not the loop takes the time.
"""

import functools
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from ancestral.launch import experiment as experiment_lib
from ancestral.launch import fields
from ancestral.models import base as model_base
from ancestral.models import transformer
from ancestral.sampling import base, beam, contrastive, decode, ngram, superposed, truncation
from ancestral.sampling import logits as logits_lib

_WORKDIR = flags.DEFINE_string("workdir", None, "Of a run on text.", required=True)
_PROMPTS = flags.DEFINE_integer("num_prompts", 128, "Held-out prompts.")
_LENGTH = flags.DEFINE_integer("prompt_length", 48, "Tokens of each.")
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 32, "Tokens of each draft.")
_DRAFTS = flags.DEFINE_integer("num_drafts", 3, "Drafts of each prompt.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed repetitions of each system.")
_JSON = flags.DEFINE_string("json", None, "File for the results.")

TIMED = (
  "greedy",
  "contrastive, k 5",
  "sampling",
  "nucleus 0.9",
  "superposed",
  "superposed, counts",
)
DEPTHS = (1, 2, 4, 8, 16, 31)
LARGE = {  # 30M parameters, as in decode_hf
  "vocab_size": 8192,
  "max_length": 1024,
  "num_layers": 8,
  "width": 512,
  "num_heads": 8,
  "mlp_width": 1376,
}


def prompts_of(experiment):
  """(prompts [B, P], what follows them [B, N]) from random places of the held-out texts."""
  rng, width = np.random.default_rng(0), _LENGTH.value + _NEW_TOKENS.value
  texts = [experiment.held_out[i]["tokens"] for i in range(len(experiment.held_out))]
  texts = [text for text in texts if len(text) >= width]
  sizes = np.array([len(text) - width + 1 for text in texts])
  cuts = []
  for _ in range(_PROMPTS.value):
    text = rng.choice(len(texts), p=sizes / sizes.sum())
    start = rng.integers(sizes[text])
    cuts.append(texts[text][start : start + width])
  return np.split(np.asarray(cuts, np.int32), [_LENGTH.value], axis=1)


def run(algorithm, tokens, num_steps, observe=lambda state, info: None):
  """The first state, the last one, and what `observe` saw."""
  keys = base.row_keys(jax.random.key(0), jnp.arange(tokens.shape[0]))
  lengths = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
  state = base.start(keys, algorithm, decode.Prompts(tokens, lengths))
  return state, *base.run(keys, algorithm, state, num_steps, observe)


def systems(model, width, table):
  """Functions of (params, prompts [B, P]) -> tokens [B, K, S], by name, jitted."""
  size, num_drafts = _NEW_TOKENS.value, _DRAFTS.value
  bounds = {"max_length": width + size, "max_new_tokens": size}

  def drawn(transform, count):
    def sample(params, tokens):
      repeated = jnp.repeat(tokens, count, axis=0)
      algorithm = decode.autoregressive(model, params, transform=transform, **bounds)
      return run(algorithm, repeated, size)[1].tokens.reshape(tokens.shape[0], count, -1)

    return sample

  def contrasted(params, tokens):
    algorithm = contrastive.contrastive(model, params, **bounds)
    return run(algorithm, tokens, size)[1].tokens[:, None]

  def beams(params, tokens):
    algorithm = beam.beam_search(model, params, num_beams=num_drafts, length_penalty=0.0, **bounds)
    return run(algorithm, tokens, size)[1].finished.tokens

  def drafts(params, tokens, **kwargs):
    algorithm = superposed.superposed(model, params, num_drafts=num_drafts, **bounds, **kwargs)
    return run(algorithm, tokens, size)[1].tokens

  counts = lambda alpha: superposed.interpolated(table, alpha=alpha)
  every = {
    "greedy": drawn(logits_lib.greedy(), 1),
    "contrastive, k 5": contrasted,
    "sampling": drawn(logits_lib.chain(), num_drafts),
    "nucleus 0.9": drawn(truncation.top_p(0.9), num_drafts),
    "beam search": beams,
    "superposed": drafts,
    "superposed, counts": functools.partial(drafts, scoring=counts(0.54)),
    "superposed, counts, T 0.06": functools.partial(drafts, scoring=counts(0.54), temperature=0.06),
    "counts alone": functools.partial(drafts, scoring=counts(1.0)),
  }
  return {name: jax.jit(sample) for name, sample in every.items()}


def law(model):
  """(params, tokens [B, L]) -> log-probabilities [B, L, V], each row read whole."""

  @jax.jit
  def log_law(params, tokens):
    hidden, _ = model_base.apply(model, params, tokens)
    return jax.nn.log_softmax(model.readout(params, hidden), axis=-1)

  return log_law


def quality(log_law, params, tokens, prompts, text) -> dict:
  """One row of the table of drafts [B, K, S]."""
  batch_size, num_drafts, _ = tokens.shape
  width = prompts.shape[1]
  flat = tokens.reshape(batch_size * num_drafts, -1)
  scored = np.asarray(log_law(params, flat))[:, width - 1 : -1]
  taken = np.take_along_axis(scored, np.asarray(flat)[:, width:, None], axis=2)[..., 0]
  loss = -taken.mean(axis=1).reshape(batch_size, num_drafts)
  new = np.asarray(tokens)[:, :, width:]
  pairs = [(i, j) for i in range(num_drafts) for j in range(i)]
  agreed = np.cumprod(new == text[:, None], axis=2).sum(axis=2)
  return {
    "perplexity": float(np.exp(loss.mean())),
    "perplexity of the best": float(np.exp(loss.min(axis=1).mean())),
    "standard error, nats": float(loss.mean(axis=1).std() / batch_size**0.5),
    "different tokens": float(np.mean([new[:, i] != new[:, j] for i, j in pairs]) if pairs else 0),
    "tokens as the text": float(agreed.max(axis=1).mean()),
  }


def linearity(model, params, prompts, scoring) -> list[dict]:
  """How the superposed law departs from the mixture of its drafts' laws, by depth."""
  width, size = prompts.shape[1], _NEW_TOKENS.value

  @jax.jit
  def trace(params, tokens):
    algorithm = superposed.superposed(
      model,
      params,
      max_length=width + size,
      max_new_tokens=size,
      num_drafts=_DRAFTS.value,
      scoring=scoring,
    )

    def observe(state, info=None):
      mixed = superposed.superposition(model, params, state)[:, 0]
      return mixed, superposed.weights(state), state.tokens

    first, _, seen = run(algorithm, tokens, size, observe)
    mixed = jnp.concatenate([observe(first)[0][None], seen[0][:-1]])  # [N, B, D]
    read = model.embed(params, tokens[:, :-1])
    x = jnp.concatenate([read, jnp.swapaxes(mixed, 0, 1).astype(read.dtype)], axis=1)
    hidden, _ = model.trunk(params, x)
    return hidden[:, width - 1 :], seen[1], seen[2]

  @jax.jit
  def apart(params, tokens):
    return model_base.apply(model, params, tokens)[0]

  hidden, weights, tokens = jax.device_get(trace(params, prompts))
  probabilities = lambda h: np.asarray(jax.nn.softmax(model.readout(params, h), axis=-1))
  rows = []
  for depth in (depth for depth in DEPTHS if depth < size):
    w, flat = weights[depth - 1], tokens[depth - 1].reshape(-1, tokens.shape[-1])
    whole = np.asarray(apart(params, flat))[:, width - 1 + depth]
    each = whole.reshape(*w.shape, -1)
    laws = probabilities(each)
    mixture, ours = np.einsum("bk,bkv->bv", w, laws), probabilities(hidden[:, depth])
    mean = np.einsum("bk,bkd->bd", w, each)
    norms = np.linalg.norm(mean, axis=1) * np.linalg.norm(hidden[:, depth], axis=1)
    distance = lambda law, mixture=mixture: float(0.5 * np.abs(law - mixture).sum(axis=1).mean())
    rows.append(
      {
        "depth": depth,
        "effective drafts": float(np.mean(1 / np.square(w).sum(axis=1))),
        "cosine of hidden states": float(np.mean((mean * hidden[:, depth]).sum(axis=1) / norms)),
        "TV of the superposed law": distance(ours),
        "TV of the best draft's law": distance(laws[:, 0]),
      }
    )
  return rows


def speed(samples, params, prompts) -> dict:
  """Seconds of each system."""
  calls = {
    name: functools.partial(lambda sample: sample(params, prompts).block_until_ready(), sample)
    for name, sample in samples.items()
  }
  timed = {name: [] for name in calls}
  for call in calls.values():
    call()
  for _ in range(_REPEATS.value):
    for name, call in calls.items():
      start = time.perf_counter()
      call()
      timed[name].append(time.perf_counter() - start)
  return {name: min(times) for name, times in timed.items()}


def show(title, rows):
  """Prints dictionaries as a Markdown table."""
  print(f"\n{title}\n| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
  for row in rows:
    cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()]
    print("| " + " | ".join(cells) + " |")


def draft_table(model, params, table, prompts, text) -> list[dict]:
  """Each system's drafts, and the text itself, as the model sees them."""
  log_law = law(model)
  whole = np.concatenate([prompts, text], axis=1)[:, None]
  every = {
    name: sample(params, prompts)
    for name, sample in systems(model, prompts.shape[1], table).items()
  }
  return [
    {"system": name, **quality(log_law, params, tokens, prompts, text)}
    for name, tokens in {**every, "the text": whole}.items()
  ]


def speed_table(model, params, table, prompts) -> list[dict]:
  """Seconds of the trained model and of a larger one."""
  large = transformer.transformer(transformer.TransformerConfig(**LARGE))
  random = transformer.unstack(large.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
  rows = []
  pairs = (("trained", model, params), ("30M, random", large, random))
  for name, network, weights in pairs:
    samples = systems(network, prompts.shape[1], table)
    samples = {system: samples[system] for system in TIMED}
    for batch_size in (1, 16):
      seconds = speed(samples, weights, jnp.asarray(prompts[:batch_size]))
      rows.append({"model": name, "prompts": batch_size, **seconds})
  return rows


def main(_):
  """Prints the tables, and writes them."""
  logging.set_verbosity(logging.ERROR)  # of checkpoints
  experiment, params, step = experiment_lib.restore_params(None, _WORKDIR.value)
  model = experiment.model
  texts = [experiment.source[i]["tokens"] for i in range(len(experiment.source))]
  start = time.perf_counter()
  table = ngram.build(texts, 6)
  built = time.perf_counter() - start
  prompts, text = prompts_of(experiment)
  print(f"Step {step}; {int(table.before[-1])} runs of 6 tokens, {len(table.grams)} distinct.")
  drafts = draft_table(model, params, table, prompts, text)
  show("Drafts", drafts)
  scorings = {"likelihood": None, "counts": superposed.interpolated(table)}
  laws = [
    {"scoring": name, **row}
    for name, scoring in scorings.items()
    for row in linearity(model, params, prompts, scoring)
  ]
  show("Linearity", laws)
  timed = speed_table(model, params, table, prompts)
  show("Seconds", timed)
  result = {
    "date": time.strftime("%Y-%m-%d"),
    "machine": f"{os.cpu_count()} cores, {jax.devices()[0].device_kind}",
    "jax": jax.__version__,
    "run": fields.to_json(experiment.config),
    "table": {"runs": int(table.before[-1]), "distinct": len(table.grams), "seconds": built},
    "drafts": drafts,
    "linearity": laws,
    "seconds": timed,
  }
  if _JSON.value:
    with open(_JSON.value, "w") as file:
      json.dump(result, file, indent=1)


if __name__ == "__main__":
  app.run(main)
