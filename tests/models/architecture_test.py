"""What families differ in, against a transformer in numpy, one token and one head at a time."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import base, rotary, transformer

LLAMA3 = {
  "rope_type": "llama3",
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
GEMMA = {
  **targets.GEMMA2,
  "attention_scale": 0.25,
  "attention_softcap": 1.5,
  "logit_softcap": 4.0,
  "num_layers": 3,
}
GPT2 = {**targets.GPT2, "norm_epsilon": 1e-3}
VARIANTS = {
  "llama": {},
  "gemma": GEMMA,
  "gpt2": GPT2,
  "query_bias": {"qkv_bias": True},
  "output_bias": {"output_bias": True, "qk_norm": True},
  "mlp_bias": {"mlp_bias": True, "activation": "gelu"},
  "no_mlp_bias": {"use_bias": True, "mlp_bias": False},
  "late_windows": {"window": 2, "window_pattern": (False, False, True, True), "num_layers": 4},
  "no_windows": {"window": 2, "window_pattern": (False,)},
  "linear": {"rotary_scaling": rotary.Linear(factor=4.0)},
  "llama3": {"rotary_scaling": rotary.parse(LLAMA3), "rotary_base": 50.0},
  "yarn": {"rotary_scaling": rotary.parse(YARN), "rotary_base": 50.0},
  "yarn_factor": {
    "rotary_scaling": rotary.parse({**YARN, "attention_factor": 0.7}),
    "qk_norm": True,
  },
}
TOKENS = np.random.default_rng(0).integers(0, 23, (2, 14))


def normed(c, params, x):
  if c.norm == "layer":
    x = (x - x.mean()) / np.sqrt(x.var() + c.norm_epsilon)
    return x * params["scale"] + params["bias"]
  scale = params["scale"] + (1 if c.zero_centred_norms else 0)
  return x / np.sqrt(np.mean(x**2) + c.norm_epsilon) * scale


def dense(params, x):
  return x @ params["kernel"] + params.get("bias", 0)


def activated(name, x):
  if name == "silu":
    return x / (1 + np.exp(-x))
  if name == "gelu":
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
  return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def turned(c, x, position):
  """A head, each plane as a complex number; and what it is longer by."""
  half, scaling = len(x) // 2, c.rotary_scaling
  out, longer = np.array(x), 1.0
  for i in range(half):
    speed = c.rotary_base ** (-i / half)
    if scaling is not None:
      speed, longer = stretched(scaling, speed, i, half, c.rotary_base)
    plane = complex(x[i], x[i + half]) * np.exp(1j * position * speed)
    out[i], out[i + half] = plane.real, plane.imag
  return out * longer


def stretched(scaling, speed, i, half, base):
  """The frequency as transformers' and Meta's code says, plane by plane, and m."""
  kind, slow = type(scaling).__name__, speed / scaling.factor
  if kind == "Linear":
    return slow, 1.0
  context = scaling.original_max_position_embeddings
  if kind == "Llama3":
    wavelength = 2 * math.pi / speed
    if wavelength < context / scaling.high_freq_factor:
      return speed, 1.0
    if wavelength > context / scaling.low_freq_factor:
      return slow, 1.0
    smooth = context / wavelength - scaling.low_freq_factor
    smooth /= scaling.high_freq_factor - scaling.low_freq_factor
    return (1 - smooth) * slow + smooth * speed, 1.0
  plane = lambda turns: half * math.log(context / (turns * 2 * math.pi)) / math.log(base)
  low, high = max(math.floor(plane(32)), 0), min(math.ceil(plane(1)), 2 * half - 1)
  ramp = min(max((i - low) / (high - low), 0), 1)
  longer = 0.1 * math.log(scaling.factor) + 1
  longer = longer if scaling.attention_factor is None else scaling.attention_factor
  return slow * ramp + speed * (1 - ramp), longer


def attended(c, params, xs, local):
  """The attention's output for every token of xs [L, D]."""
  heads = {"query": c.num_heads, "key": c.num_kv_heads, "value": c.num_kv_heads}
  projected = {}
  for name, count in heads.items():
    split = [dense(params[name], x).reshape(count, c.head_dim) for x in xs]
    if c.qk_norm and name != "value":
      split = [np.stack([normed(c, params[f"{name}_norm"], head) for head in x]) for x in split]
    if c.positions == "rotary" and name != "value":
      split = [np.stack([turned(c, head, t) for head in x]) for t, x in enumerate(split)]
    projected[name] = split
  out = np.zeros((len(xs), c.num_heads, c.head_dim))
  for t, h in itertools.product(range(len(xs)), range(c.num_heads)):
    group = h // (c.num_heads // c.num_kv_heads)
    seen = [s for s in range(t + 1) if not local or t - s < c.window]
    scores = [projected["query"][t][h] @ projected["key"][s][group] for s in seen]
    scores = np.array(scores) * c.attention_scale
    if c.attention_softcap:
      scores = c.attention_softcap * np.tanh(scores / c.attention_softcap)
    weights = targets.softmax(scores)
    out[t, h] = sum(w * projected["value"][s][group] for w, s in zip(weights, seen, strict=True))
  return [dense(params["output"], x.reshape(-1)) for x in out]


def reference(config, params, tokens):
  """Logits [L, V] of one row, float64."""
  c = config.resolved()
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  xs = [params["embedding"][token] * c.embedding_scale for token in tokens]
  if c.positions == "learned":
    xs = [x + params["positions"][t] for t, x in enumerate(xs)]
  after = lambda layer, name, x: normed(c, layer[name], x) if c.post_norms else x
  for i, layer in enumerate(params["layers"]):
    local = c.window is not None and c.window_pattern[i % len(c.window_pattern)]
    inputs = [normed(c, layer["attention_norm"], x) for x in xs]
    mixed = attended(c, layer["attention"], inputs, local)
    xs = [x + after(layer, "attention_post_norm", y) for x, y in zip(xs, mixed, strict=True)]
    for t, x in enumerate(xs):
      y = normed(c, layer["mlp_norm"], x)
      hidden = dense(layer["mlp"]["up"], y)
      if c.gated_mlp:
        hidden = hidden * activated(c.activation, dense(layer["mlp"]["gate"], y))
      else:
        hidden = activated(c.activation, hidden)
      xs[t] = x + after(layer, "mlp_post_norm", dense(layer["mlp"]["down"], hidden))
  logits = np.stack([params["embedding"] @ normed(c, params["final_norm"], x) for x in xs])
  cap = c.logit_softcap
  return logits if cap is None else cap * np.tanh(logits / cap)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_numpy_token_by_token(name):
  model, params = targets.tiny_target(**VARIANTS[name])
  with jax.default_matmul_precision("highest"):
    hidden, _ = targets.apply(model, params, jnp.asarray(TOKENS, jnp.int32))
    logits = np.asarray(model.readout(params, hidden))
  expected = [
    reference(targets.tiny_config(**VARIANTS[name]), transformer.unstack(params), row)
    for row in TOKENS
  ]
  assert np.std(expected) > 0.3
  np.testing.assert_allclose(logits, expected, atol=2e-4)


def test_a_pattern_repeats_and_ends_anywhere():
  config = targets.tiny_config(window=4, window_pattern=[True, True, False], num_layers=5)
  assert config.local_layers == (True, True, False, True, True)
  assert targets.tiny_config(window_pattern=(True, False)).local_layers == (False, False)
  assert hash(config) == hash(targets.tiny_config(**{**vars(config)}))


def test_a_mapping_becomes_a_scaling_and_back():
  for fields in (LLAMA3, YARN, {"rope_type": "linear", "factor": 2.0}):
    config = targets.tiny_config(rotary_scaling=fields)
    assert config == targets.tiny_config(rotary_scaling=rotary.parse(fields))
    assert fields.items() <= rotary.fields(config.rotary_scaling).items()


@pytest.mark.parametrize("name", ["gpt2", "gemma"])
def test_init_begins_with_norms_that_only_normalise(name):
  model = transformer.transformer(targets.tiny_config(**VARIANTS[name]))
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
  x = np.random.default_rng(0).normal(size=32)
  c = targets.tiny_config(**VARIANTS[name])
  norms = [params["final_norm"], transformer.unstack(params)["layers"][0]["mlp_norm"]]
  for norm in norms:
    out = normed(c, jax.tree.map(np.asarray, norm), x)
    expected = x - x.mean() if name == "gpt2" else x
    np.testing.assert_allclose(out, expected / np.sqrt(np.mean(expected**2)), rtol=1e-3)


@pytest.mark.parametrize(
  "fields, culprit",
  [
    ({"activation": "relu"}, "activation='relu'"),
    ({"norm": "batch"}, "norm='batch'"),
    ({"norm": "layer", "zero_centred_norms": True}, "zero_centred_norms"),
    ({"attention_softcap": 0.0}, "attention_softcap=0.0"),
    ({"attention_scale": -1.0}, "attention_scale=-1.0"),
    ({"embedding_scale": 0.0}, "embedding_scale=0.0"),
    ({"window_pattern": ()}, r"window_pattern=\(\)"),
    ({"rotary_scaling": YARN, "positions": "none"}, "positions='none'"),
    ({"rotary_scaling": {"rope_type": "longrope"}}, "rope_type='longrope'"),
    ({"rotary_scaling": {"rope_type": "linear"}}, r"needs \['factor'\]"),
    ({"rotary_scaling": {**YARN, "alpha": 1}}, r"has no fields \['alpha'\]"),
    ({"rotary_scaling": {"rope_type": "linear", "factor": "two"}}, "factor='two'"),
  ],
)
def test_fields_that_do_not_fit_are_named(fields, culprit):
  with pytest.raises(ValueError, match=culprit) as error:
    targets.tiny_config(**fields)
  assert "\n" not in str(error.value)


LIBRARY = {
  "causal": {},
  "grouped window": {"window": 5},
  "bidirectional": {"causal": False, "num_kv_heads": 4},
  "alternating windows": {"window": 3, "window_pattern": (True, False)},
  "scaled": {"attention_scale": 0.3, "head_dim": 12},
}


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("name", LIBRARY)
def test_the_librarys_attention_is_the_same(name, segments):
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 23, (2, 12)))
  mask = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 3, (2, 12))))
  kwargs = {"mask": mask[:, :, None] == mask[:, None, :]} if segments else {}
  found = []
  for attention in ("exact", "xla"):
    model, params = targets.tiny_target(**LIBRARY[name], attention=attention)

    def total(params, model=model):
      return jnp.sum(jnp.sin(base.apply(model, params, tokens, **kwargs)[0]))

    with jax.default_matmul_precision("highest"):
      found.append(jax.jit(jax.value_and_grad(total))(params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *found)


def test_what_the_librarys_attention_lacks():
  with pytest.raises(ValueError, match="attention='xla' has no attention_softcap"):
    targets.tiny_config(attention="xla", attention_softcap=5.0)
