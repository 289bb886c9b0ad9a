"""Every sampler, on targets so small that it compiles quickly: what `conformance_test` crosses."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import targets
from ancestral.models import bridges as bridge_models
from ancestral.models import guided, mask_schedules, schedules, toy, toy_discrete
from ancestral.sampling import (
  ancestral,
  automata,
  base,
  beam,
  blocks,
  bridges,
  constraints,
  contrastive,
  correctors,
  decode,
  draft_trees,
  drafting,
  feedback,
  history,
  jumps,
  logits,
  lookup,
  masked,
  multistep,
  noise_optimization,
  noise_search,
  noises,
  particles,
  remasking,
  singlestep,
  soft_values,
  solvers,
  speculative,
  stochastic_beam,
  superposed,
  truncation,
  uniform_state,
  unmasking,
)


class Case(NamedTuple):
  name: str
  algorithm: Callable[[Any], base.SamplingAlgorithm]  # of params, inside jit
  params: Any
  inputs: Callable[[list[int]], Any]  # requests -> what init takes, leaves leading with [B]
  sample: Callable[[Any], dict[str, jax.Array]]  # state -> what was drawn, [B, ...]
  dtypes: dict[str, str]
  eager: bool = False  # one of each family is also run without jit
  num_steps: int = 5
  draws: bool = True  # otherwise keys change nothing


PROMPTS = np.array([[1, 2, 0, 0], [3, 0, 0, 0], [2, 2, 1, 3], [0, 4, 1, 0]], np.int32)
LENGTHS = np.array([2, 1, 4, 3], np.int32)


def prompts(requests):
  return decode.Prompts(jnp.asarray(PROMPTS[requests]), jnp.asarray(LENGTHS[requests]))


def decoding(name, target, transform=logits.chain, make=decode.autoregressive, **kwargs):
  model, params = target
  algorithm = lambda params: base.recorded(
    make(model, params, max_length=10, max_new_tokens=4, transform=transform(), stop=(2,)),
    lambda state, info: info,
    4,
  )
  sample = lambda recorded: {
    "tokens": recorded.state.tokens,
    "length": recorded.state.length,
    **recorded.record._asdict(),
  }
  dtypes = {
    "tokens": "int32",
    "length": "int32",
    "token": "int32",
    "count": "int32",
    "log_prob": "float32",
    "model_log_prob": "float32",
    "kept": "bool",
  }
  return Case(name, algorithm, params, prompts, sample, dtypes, **kwargs)


def searching(name, target, make, fields, **kwargs):
  """A sampler of several drafts a row, which reports `fields` of its state."""
  model, params = target
  algorithm = lambda params: make(model, params, max_length=10, max_new_tokens=4, stop=(2,))
  dtypes = {name: "int32" if name in ("tokens", "length") else "float32" for name in fields}
  return Case(name, algorithm, params, prompts, fields_of(fields), dtypes, **kwargs)


def fields_of(fields):
  return lambda state: {name: getattr(state, name) for name in fields}


def beams(name, target, make, **kwargs):
  """A search by beams: where they went, and what it found."""
  model, params = target
  algorithm = lambda params: base.recorded(
    make(model, params, max_length=10, max_new_tokens=4, stop=(2,)),
    lambda state, info: {"parent": info.parent, "token": info.token},
    4,
  )
  sample = lambda recorded: {**recorded.state.finished._asdict(), **recorded.record}
  dtypes = dict.fromkeys(("tokens", "length", "parent", "token"), "int32")
  dtypes |= dict.fromkeys(("log_prob", "score"), "float32")
  return Case(name, algorithm, params, prompts, sample, dtypes, **kwargs)


def filters():
  return logits.chain(logits.temperature(1.3), truncation.top_k(4), truncation.top_p(0.9))


def truncations():
  return logits.chain(
    logits.dynamic_temperature(1.2, 0.3),
    truncation.eta(1e-3),
    truncation.typical(0.95),
    truncation.top_h(0.9),
    truncation.xtc(0.5, 0.2),
  )


def repeats_and_languages():
  words = automata.from_sequences([[0, 1, 3], [4, 4], [3, 0, 1, 1]], 5)
  return logits.chain(
    history.repetition_penalty(1.3),
    history.no_repeat_ngram(3),
    history.dry(0.8, breakers=((2,),)),
    constraints.constrain(words, (2,), 4),
  )


def surprise():
  return logits.chain(feedback.mirostat(1.5), feedback.mirostat_v2(1.2))


def guided_target():
  model, params = targets.table_target(vocab_size=5)
  return guided.guided(model, 1.5, 1), params


def speculating(drafter_of):
  """Decoding speculatively, by drafter_of(model, other params)."""

  def make(model, params, **kwargs):
    drafter = drafter_of(model, jax.tree.map(lambda leaf: 1.5 * leaf, params))
    return speculative.speculative(model, params, drafter, **kwargs)

  return make


CHAIN = functools.partial(drafting.by_model, num_drafts=2)
ADAPTIVE = functools.partial(
  drafting.by_model, num_drafts=3, confidence=lambda hidden, token, logits: 0.9 - 0.1 * token
)
TREE = functools.partial(draft_trees.by_model, parents=(-1, -1, 0))


SPECULATIVE = ("tokens", "length")


def solving(table, means):
  """(denoiser, table) of a mixture whose means are the params."""
  schedule = schedules.rectified_flow()
  times = np.append(schedule.time(np.linspace(-3, 3, 4)), 0.0)
  mixture = toy.GaussianMixture(jnp.array([0.4, 0.6]), means, jnp.array([0.1, 0.3]))
  return toy.mixture_denoiser(mixture, schedule), table(schedule, times)


def diffusing(name, table, of=solvers.tabulated, field="slots", **kwargs):
  """Diffusion by a table whose output is the image; or `of` a table, in a field of its state."""
  algorithm = lambda means: of(*solving(table, means))
  inputs = lambda requests: jnp.asarray(CLEAN[requests])
  means = jnp.array([[1.0, -0.5, 0.2], [-0.8, 0.4, 0.6]])
  return Case(name, algorithm, means, inputs, fields_of((field,)), {field: "float32"}, **kwargs)


def near_noises(denoise, table):
  sample = noise_search.of_table(denoise, table)
  return noise_search.zero_order(sample, lambda x: x[:, 0], width=2, distance=0.5)


def descending(denoise, table):
  loss = lambda x, noise: jnp.sum(jnp.square(x - 0.3), axis=1)
  sgd = optax.sgd(0.1, momentum=0.5)
  return noise_optimization.optimized(noise_search.of_table(denoise, table), loss, sgd)


def bridging():
  """Paths of a light bridge, its params the bridge."""
  rng = np.random.default_rng(0)
  shapes = (2,), (2, 3), (2, 3, 3)
  params = bridge_models.LightBridge(
    *(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
  )
  algorithm = lambda params: bridges.euler_maruyama(
    bridge_models.drift(params, 0.5), np.linspace(0, 1, 5), 0.5
  )
  inputs = lambda requests: jnp.asarray(CLEAN[requests])
  return Case("bridge", algorithm, params, inputs, fields_of(("x",)), {"x": "float32"})


BLANKS = np.array([[3, 3, 3, 3], [3, 1, 3, 0], [2, 3, 3, 3], [0, 1, 3, 3]], np.int32)
LINEAR = mask_schedules.linear()
TIMES = np.linspace(1, 0, 6)


def filling(name, make, fields=("tokens", "calls"), **kwargs):
  """Masked sampling, of a joint law of 4 tokens of 3 whose logits are the params."""

  def algorithm(logits):
    joint = jax.nn.softmax(logits.reshape(-1)).reshape(logits.shape)
    return make(toy.joint_predictor(joint))

  params = jnp.asarray(np.random.default_rng(0).normal(size=(3,) * 4), jnp.float32)
  inputs = lambda requests: jnp.asarray(BLANKS[requests])
  dtypes = {name: "float32" if name == "confidence" else "int32" for name in fields}
  return Case(name, algorithm, params, inputs, fields_of(fields), dtypes, **kwargs)


def of_blocks():
  """Blocks of two tokens, of a transformer."""
  model, params = targets.tiny_target(num_layers=1, causal=False, vocab_size=4)
  rule = unmasking.top(unmasking.random_order)
  algorithm = lambda params: blocks.unmask(model, params, rule, 2, mask=3)
  inputs = lambda requests: jnp.asarray(BLANKS[requests])
  dtypes = {"tokens": "int32", "calls": "int32"}
  return Case("blocks", algorithm, params, inputs, fields_of(("tokens", "calls")), dtypes)


def jumping(name, kind, make, **kwargs):
  """Jumps between all tokens, or from the mask, of the same law."""
  noise = kind(LINEAR, 3)
  exact = {
    noises.masking: toy.joint_predictor,
    noises.uniform: lambda joint: toy_discrete.uniform_predictor(joint, LINEAR),
  }[kind]

  def algorithm(logits):
    joint = jax.nn.softmax(logits.reshape(-1)).reshape(logits.shape)
    return make(exact(joint), noise)

  params = jnp.asarray(np.random.default_rng(0).normal(size=(3,) * 4), jnp.float32)
  inputs = lambda requests: jnp.asarray(BLANKS[requests])
  dtypes = dict.fromkeys(("tokens", "calls"), "int32")
  return Case(name, algorithm, params, inputs, fields_of(("tokens", "calls")), dtypes, **kwargs)


def jumps_with_gibbs(predict, noise):
  coarse = jumps.ancestral(predict, noise, TIMES)
  return jumps.corrected(coarse, uniform_state.gibbs(predict, noise), TIMES)


def corrected(predict):
  coarse = masked.ancestral(predict, LINEAR, TIMES, mask=3)
  return remasking.corrected(coarse, remasking.gibbs(predict, mask=3), mask=3)


def steering(name, steer, sample, dtypes):
  """First hitting steered towards small tokens."""
  reward = lambda state: -jnp.sum(jnp.where(state.tokens == 3, 1.0, state.tokens), axis=1)
  hitting = lambda predict: masked.first_hitting(predict, LINEAR, mask=3)
  case = filling(name, lambda predict: steer(hitting(predict), soft_values.of_state(reward)))
  return case._replace(sample=sample, dtypes=dtypes)


def chosen_step_by_step(algorithm, value):
  return particles.svdd(algorithm, value, num_candidates=3, temperature=0.5)


def weighed(algorithm, value):
  return particles.smc(algorithm, value, num_particles=3, temperature=0.5)


CLEAN = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)

CASES = [
  decoding("autoregressive-table", targets.table_target(vocab_size=5), eager=True),
  decoding("autoregressive-markov-filtered", targets.markov_target(), filters),
  decoding("autoregressive-transformer", targets.tiny_target(num_layers=1)),
  decoding("autoregressive-bfloat16", targets.tiny_target(num_layers=1, dtype="bfloat16")),
  decoding("autoregressive-truncated", targets.markov_target(), truncations),
  decoding("autoregressive-constrained", targets.table_target(5), repeats_and_languages),
  decoding("autoregressive-mirostat", targets.markov_target(), surprise),
  decoding("autoregressive-guided", guided_target()),
  decoding(
    "contrastive",
    targets.tiny_target(num_layers=1),
    make=functools.partial(contrastive.contrastive, k=3),
    draws=False,
  ),
  searching(
    "superposed",
    targets.table_target(vocab_size=5),
    functools.partial(superposed.superposed, num_candidates=5),
    ("tokens", "length", "score"),
    draws=False,
  ),
  searching("speculative", targets.table_target(5), speculating(CHAIN), SPECULATIVE),
  searching("speculative-adaptive", targets.table_target(5), speculating(ADAPTIVE), SPECULATIVE),
  searching("speculative-tree", targets.table_target(5), speculating(TREE), SPECULATIVE),
  searching(
    "speculative-suffix",
    targets.table_target(5),
    speculating(lambda model, params: lookup.suffix(5, num_drafts=2)),
    SPECULATIVE,
  ),
  beams(
    "beam",
    targets.table_target(vocab_size=5),
    functools.partial(beam.beam_search, num_beams=2),
    draws=False,
  ),
  beams(
    "stochastic-beam",
    targets.table_target(vocab_size=5),
    functools.partial(stochastic_beam.stochastic_beam_search, num_beams=3),
  ),
  diffusing("diffusion-unipc", correctors.unipc, eager=True),
  diffusing("diffusion-sde", functools.partial(multistep.dpmpp_2m, eta=1.0)),
  diffusing(
    "diffusion-ancestral",
    lambda schedule, times: singlestep.singlestep(
      schedule, times, ancestral.renoised(singlestep.euler)
    ),
  ),
  diffusing("noise-search", ancestral.ddim, near_noises, "x"),
  diffusing("noise-optimization", ancestral.ddim, descending, "noise"),
  bridging(),
  filling(
    "masked-first-hitting",
    lambda predict: masked.first_hitting(predict, LINEAR, mask=3),
    eager=True,
  ),
  filling("masked-ancestral", lambda predict: masked.ancestral(predict, LINEAR, TIMES, mask=3)),
  filling(
    "masked-ordered",
    lambda predict: masked.unmask(predict, unmasking.top(unmasking.margin), mask=3),
  ),
  filling(
    "masked-entropy-bound",
    lambda predict: masked.unmask(predict, unmasking.entropy_bound(0.5), mask=3),
  ),
  filling(
    "masked-remasking",
    lambda predict: remasking.remasking(predict, LINEAR, TIMES, remasking.cap(0.3), mask=3),
    ("tokens", "calls", "confidence"),
  ),
  filling("masked-gibbs", corrected),
  of_blocks(),
  steering(
    "svdd",
    chosen_step_by_step,
    lambda state: {"tokens": state.state.tokens, "calls": state.calls},
    {"tokens": "int32", "calls": "int32"},
  ),
  steering(
    "smc",
    weighed,
    lambda state: {"tokens": state.states.tokens, "log_z": particles.log_z(state)},
    {"tokens": "int32", "log_z": "float32"},
  ),
  jumping("masked-euler", noises.masking, lambda p, noise: jumps.euler(p, noise, TIMES)),
  jumping("uniform-tau", noises.uniform, lambda p, noise: jumps.tau_leaping(p, noise, TIMES)),
  jumping("uniform-gibbs", noises.uniform, jumps_with_gibbs),
  jumping("uniform-gillespie", noises.uniform, uniform_state.gillespie),
]
