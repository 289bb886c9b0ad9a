"""Speculative decoding of continuous tokens on Fashion-MNIST, beside plain decoding, in markdown.

  python -m ancestral.benchmarks.continuous --data_dir=DIR            # a mixture head
  python -m ancestral.benchmarks.continuous --data_dir=DIR --head=diffusion

DIR holds train-images-idx3-ubyte.gz. Images are averaged over 2x2 pixels to 14x14, rounded to 32
grey levels and given uniform noise of a level's width, so that densities are bounded, then scaled
to [-1, 1]; a token is a patch of 2x2, and there are 49. A target and a smaller draft model are
trained on them, and then drawn from: with and without speculation, and by the rule of the code of
Wang et al. 2024 (arXiv 2411.11925): a draft is accepted by (p / q)^(1 / 42^2), which is their inner
temperature for Gaussians of one covariance, and every position judged as if the others stood.

Laws are compared with the plain one by the energy distance of whole images, 2 E|x - y| - E|x - x'|
- E|y - y'|, over sqrt(196), beside its floor: what one relabelling in a hundred of the same images
exceeds.
"""

import functools
import gzip
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from ancestral.models import heads, transformer
from ancestral.sampling import base, continuous

_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of Fashion-MNIST's files.", required=True)
_HEAD = flags.DEFINE_enum("head", "mixture", ["mixture", "diffusion"], "How a token is drawn.")
_STEPS = flags.DEFINE_integer("steps", 400, "Training steps of each model, 64 images each.")
_SAMPLES = flags.DEFINE_integer(
  "samples", 512, "Images to draw for each row, a multiple of batch_size."
)
_BATCH = flags.DEFINE_integer("batch_size", 64, "Images drawn at once.")

NUM_TOKENS, TOKEN_SIZE, LEVELS, INNER_TEMPERATURE = 49, 4, 32, 42.0
BETAS = tuple(np.geomspace(0.02, 0.6, 8))
WIDTHS = {"target": {"num_layers": 4, "width": 128}, "draft": {"num_layers": 1, "width": 64}}
COLUMNS = ("sampler", "accepted of a draft", "tokens per call", "proposals per call")
COLUMNS += ("ms per image", "energy distance", "floor")


def read_patches(folder: str) -> np.ndarray:
  """Grey levels [n, 49, 4], integers from 0 to 31."""
  raw = gzip.decompress((pathlib.Path(folder) / "train-images-idx3-ubyte.gz").read_bytes())
  images = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4))
  levels = np.floor(images * LEVELS / 256).astype(np.uint8)
  return levels.reshape(-1, 7, 2, 7, 2).swapaxes(2, 3).reshape(-1, NUM_TOKENS, TOKEN_SIZE)


def dequantised(key: jax.Array, levels: jax.Array) -> jax.Array:
  """Levels spread over their width, in [-1, 1]."""
  return (levels + jax.random.uniform(key, levels.shape)) * (2 / LEVELS) - 1


def mixture_loss(model, key, params, hidden, token):
  """-log p(token | hidden) of one position."""
  return -model.law(params, hidden).log_prob(token)


def diffusion_loss(predict_noise, key, params, hidden, token):
  """|eps - eps(x_t, t)|^2 of one position at one t, as Ho et al. 2020, equation 14."""
  step_key, noise_key = jax.random.split(key)
  t = jax.random.randint(step_key, (), 0, len(BETAS))
  kept = jnp.asarray(np.cumprod(1 - np.array(BETAS)), jnp.float32)[t]
  noise = jax.random.normal(noise_key, token.shape)
  noisy = jnp.sqrt(kept) * token + jnp.sqrt(1 - kept) * noise
  return jnp.sum(jnp.square(noise - predict_noise(params["head"], noisy, t, hidden)))


def build(num_layers: int, width: int):
  """A model and its loss of one position, (key, params, hidden, token) -> []."""
  config = transformer.TransformerConfig(
    vocab_size=1,
    max_length=NUM_TOKENS,
    num_layers=num_layers,
    width=width,
    num_heads=4,
    positions="learned",
  )
  if _HEAD.value == "mixture":
    head = heads.mixture(TOKEN_SIZE, 16, width=width, min_scale=1 / LEVELS)
    model = heads.transformer(config, TOKEN_SIZE, head)
    return model, functools.partial(mixture_loss, model)
  head, predict_noise = heads.diffusion(TOKEN_SIZE, BETAS, width=width)
  model = heads.transformer(config, TOKEN_SIZE, head)
  return model, functools.partial(diffusion_loss, predict_noise)


def train(name: str, levels: np.ndarray):
  """A trained model and its params, ready to decode."""
  model, loss_of_one = build(**WIDTHS[name])
  schedule = optax.warmup_cosine_decay_schedule(0, 2e-3, _STEPS.value // 10, _STEPS.value)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

  def loss_fn(params, key, batch):
    noise_key, loss_key = jax.random.split(key)
    tokens = dequantised(noise_key, batch)
    hidden, _ = model.trunk(params, jnp.pad(tokens[:, :-1], ((0, 0), (1, 0), (0, 0))))
    keys = jax.random.split(loss_key, tokens.shape[:2])
    of_each = jax.vmap(jax.vmap(loss_of_one, (0, None, 0, 0)), (0, None, 0, 0))
    return jnp.mean(of_each(keys, params, hidden, tokens))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(params, state, key, batch):
    loss, gradient = jax.value_and_grad(loss_fn)(params, key, batch)
    change, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, change), state, loss

  params = model.init(jax.random.key(0), jnp.zeros((1, NUM_TOKENS, TOKEN_SIZE)))
  state, rng, losses, began = optimizer.init(params), np.random.default_rng(0), [], time.time()
  for step in range(_STEPS.value):
    batch = levels[rng.integers(0, len(levels), 64)]
    key = jax.random.fold_in(jax.random.key(1), step)
    params, state, loss = update(params, state, key, batch)
    losses.append(loss)
  last = np.mean(jax.device_get(losses[-50:]))
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  print(
    f"{name}: {size:,} numbers, loss {last:.3f} per token, {time.time() - began:.0f} s", flush=True
  )
  return model, params | {"trunk": transformer.unstack(params["trunk"])}


def biased(target, params, draft, draft_params, *, num_tokens, num_drafts):
  """The authors' rule: (p / q)^(1 / 42^2), each position judged as if all others stood."""
  exact = continuous.speculative(
    target, params, draft, draft_params, num_tokens=num_tokens, num_drafts=num_drafts
  )

  def judge(key, hidden, draft_hidden, draw):
    coin_key, residual_key = jax.random.split(key)
    p, q = target.law(params, hidden), draft.law(draft_params, draft_hidden)
    log_ratio = (p.log_prob(draw) - q.log_prob(draw)) / INNER_TEMPERATURE**2
    accept_prob = jnp.exp(jnp.minimum(log_ratio, 0))
    accepted = jax.random.bernoulli(coin_key, accept_prob)
    other = continuous.residual(residual_key, p, q.log_prob, ~accepted, max_proposals=100)
    found = jnp.where(accepted, draft.value(draw), target.value(other.draw))
    return found, accepted, accept_prob, other.num_proposals

  def step(keys, state):
    drafts = continuous.propose(draft, draft_params, keys, state, num_drafts)
    last = jnp.take_along_axis(state.tokens, state.length[:, None, None] - 1, axis=1)
    read = jnp.concatenate([last, drafts.tokens[:, :-1]], axis=1)
    hidden, cache = target.trunk(params, read, state.cache)
    judge_keys = jax.vmap(lambda key: jax.random.split(key, num_drafts))(
      base.row_keys_at(keys, jnp.full(keys.shape, num_drafts))
    )
    judged = jax.vmap(jax.vmap(judge))(judge_keys, hidden, drafts.hidden, drafts.draws)
    token, accepted, accept_prob, proposals = judged
    places = state.length[:, None] + jnp.arange(num_drafts)[None, :]
    count = jnp.minimum(num_drafts, state.tokens.shape[1] - state.length)
    tokens = state.tokens.at[jnp.arange(count.size)[:, None], places].set(token, mode="drop")
    length = state.length + count
    num_accepted = jnp.sum(accepted, axis=1)
    proposals = jnp.where(count > 0, jnp.sum(proposals, axis=1), 0)
    info = continuous.ContinuousInfo(token, count, num_accepted, accept_prob, proposals)
    cache = cache._replace(length=length - 1)
    steps = state.step + (count > 0)
    return continuous.ContinuousState(steps, tokens, length, cache, drafts.cache), info

  return base.SamplingAlgorithm(exact.init, step)


def draw(make, params, seed, num_drafts):
  """Images [n, 49, 4] and what they cost, a dict of columns."""

  @jax.jit
  def sample(params, keys):
    algorithm = base.recorded(
      make(*params), lambda state, info: info._replace(token=()), NUM_TOKENS
    )
    state = base.start(keys, algorithm, None)
    return base.run_until(keys, algorithm, state, lambda state: state.state.done, NUM_TOKENS)

  requests = np.arange(_SAMPLES.value).reshape(-1, _BATCH.value)
  run = lambda rows: jax.block_until_ready(
    sample(params, base.row_keys(jax.random.key(seed), jnp.asarray(rows)))
  )
  run(requests[0])  # compiles
  began = time.time()
  out = [jax.device_get(run(rows)) for rows in requests]
  seconds = time.time() - began
  tokens = np.concatenate([some.state.tokens[:, 1:] for some in out])
  record = jax.tree.map(lambda *leaves: np.concatenate(leaves), *[some.record for some in out])
  calls = sum(some.state.step.sum() for some in out)
  stood = np.minimum(record.num_accepted, record.count).sum()
  judged = np.minimum(record.count, num_drafts).sum()
  return tokens, {
    "accepted of a draft": f"{stood / judged:.3f}" if num_drafts else "",
    "tokens per call": f"{tokens.shape[0] * NUM_TOKENS / calls:.2f}",
    "proposals per call": f"{record.num_proposals.sum() / calls:.2f}",
    "ms per image": f"{1000 * seconds / len(tokens):.1f}",
  }


def energy_distance(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
  """Of two samples [n, 49, 4], unbiased (so below 0 by chance), and its noise floor."""
  both = np.concatenate([x, y]).reshape(2 * len(x), -1)
  squares = np.sum(np.square(both), axis=1)
  apart = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * both @ both.T, 0))
  np.fill_diagonal(apart, 0)

  def distance(in_x):
    in_y, n = 1 - in_x, len(x)
    within = (in_x @ apart @ in_x + in_y @ apart @ in_y) / (n * (n - 1))
    return (2 * in_x @ apart @ in_y / n**2 - within) / both.shape[1] ** 0.5

  labels, rng = np.repeat([1.0, 0.0], len(x)), np.random.default_rng(0)
  shuffled = [distance(rng.permutation(labels)) for _ in range(200)]
  return distance(labels), np.quantile(shuffled, 0.99)


def main(_):
  """Trains, draws, and prints the table."""
  levels = read_patches(_DATA_DIR.value)
  (model, params), (draft, draft_params) = (train(name, levels) for name in ("target", "draft"))
  alone = lambda model: (
    lambda params: continuous.autoregressive(model, params, num_tokens=NUM_TOKENS)
  )

  def speculating(make, num_drafts):
    sizes = {"num_tokens": NUM_TOKENS, "num_drafts": num_drafts}
    return lambda params, draft_params: make(model, params, draft, draft_params, **sizes)

  both = (params, draft_params)
  rows = [("plain", alone(model), (params,), 0)]
  for name, make in (("exact", continuous.speculative), ("authors'", biased)):
    rows += [(f"{name}, K = {k}", speculating(make, k), both, k) for k in (1, 2, 4, 8)]
  rows.append(("the draft model alone", alone(draft), (draft_params,), 0))
  print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
  plain = draw(*rows[0][1:3], len(rows), 0)[0]
  for seed, (name, make, needed, num_drafts) in enumerate(rows):
    tokens, row = draw(make, needed, seed, num_drafts)
    far, floor = energy_distance(plain, tokens)
    row |= {"sampler": name, "energy distance": f"{far:.4f}", "floor": f"{floor:.4f}"}
    print("| " + " | ".join(row[column] for column in COLUMNS) + " |", flush=True)


if __name__ == "__main__":
  app.run(main)
