"""Diffusion models of images and points: from a configuration to the objects that it names."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..models import base as models
from ..models import dit, embeddings, mlp, partition, precondition, schedules, unet
from ..sampling import base, guidance, sharded, solvers, tables
from ..tasks import images as image_tasks
from ..training import data, denoising, step, weightings
from ..training import state as state_lib
from . import fields, held_out, pixels, solving, supervised


class Experiment(NamedTuple):
  """What a configuration stands for."""

  config: fields.Config
  examples: pixels.Examples
  noising: schedules.Schedule  # of x_t
  model: denoising.Model  # (params, x_t, t, condition, key) -> E[x_0 | x_t]
  network_config: dit.DiTConfig | unet.UNetConfig | mlp.MLPConfig
  source: data.Source  # examples to train on
  held_out: data.Source
  rows: data.Rows
  loss_fn: step.LossFn
  schedule: optax.Schedule
  optimizer: optax.GradientTransformation
  averaging: state_lib.Averaging
  init_params: Callable[[jax.Array], models.Params]  # of a key
  score: Callable[[models.Params], dict[str, float]] | None


NETWORKS = {"dit": dit.DiTConfig, "unet": unet.UNetConfig, "mlp": mlp.MLPConfig}
MAKE = {dit.DiTConfig: dit.dit, unet.UNetConfig: unet.unet, mlp.MLPConfig: mlp.mlp}

# Paths from data to noise.
NOISINGS = {
  "variance_exploding": schedules.variance_exploding,
  "rectified_flow": schedules.rectified_flow,
  "trigonometric": schedules.trigonometric,
  "linear": schedules.linear,
  "cosine": schedules.cosine,
  "sigmoid": schedules.sigmoid,
}

# Of the standard deviation of the data.
HEADS = {
  "noise": lambda sigma_data: precondition.NOISE,
  "data": lambda sigma_data: precondition.DATA,
  "velocity": lambda sigma_data: precondition.VELOCITY,
  "flow": lambda sigma_data: precondition.FLOW,
  "karras": precondition.karras,
}
WEIGHTINGS = {
  "noise": lambda sigma_data: weightings.noise,
  "data": lambda sigma_data: weightings.data,
  "velocity": lambda sigma_data: weightings.velocity,
  "flow": lambda sigma_data: weightings.flow,
  "karras": weightings.karras,
  "min_snr": lambda sigma_data: weightings.min_snr(),
  "p2": lambda sigma_data: weightings.p2(),
}

# Of the path.
TIMES = {
  "uniform": weightings.uniform,
  "log_normal": weightings.log_normal,
  "log_uniform": weightings.log_uniform,
  "logit_normal": functools.partial(weightings.log_normal, mean=0.0, std=1.0),
}
QUANTILES = {
  "low_discrepancy": weightings.low_discrepancy,
  "independent": weightings.independent,
}

# What evaluation may change: all but the network, what it puts out, and the path that it knows.
FREE_TO_EVALUATE = (
  "seed",
  "data",
  "optimizer",
  "train",
  "evaluation",
  *(f"diffusion.{name}" for name in ("weighting", "times", "quantiles", "drop_condition")),
)
FREE_TO_RESUME = ()


def build(config: fields.Config) -> Experiment:
  """All that the configuration names.

  Raises:
    ValueError, FileNotFoundError: in one line, what in it is wrong, and what would be right.
  """
  _check(config)
  c = config.diffusion
  examples = pixels.examples(config)
  noising = fields.choose("diffusion.path", c.path, NOISINGS)()
  head = fields.choose("diffusion.head", c.head, HEADS)(c.sigma_data)
  network_config = network_config_of(config, examples)
  network = MAKE[type(network_config)](network_config)
  model = of_network(network, noising, head, c.sigma_data)
  labels = examples.train_labels, examples.test_labels
  labels = (None, None) if examples.num_classes is None else labels
  noisy = {"clean_share": c.clean_share, "noise": c.data_noise}
  schedule, optimizer = fields.optimizer_of(config)
  experiment = Experiment(
    config,
    examples,
    noising,
    model,
    network_config,
    pixels.source(examples.train, labels[0], **noisy),
    pixels.source(examples.test, labels[1]),
    lambda dataset: dataset,
    _loss(c, model, noising, examples.num_classes),
    schedule,
    optimizer,
    fields.averaging_of(config),
    functools.partial(_init, network, c.learned_weighting, examples),
    score=None,
  )
  loss, show = held_out.mean_loss(experiment), _shown(experiment)
  return experiment._replace(score=lambda params: {"held_out_loss": loss(params), **show(params)})


def _shown(experiment: Experiment, num: int = 36) -> Callable[[Any], dict[str, np.ndarray]]:
  """A function of params: `samples`, a picture of images drawn as the configuration has it."""
  if experiment.examples.levels is None:  # points
    return lambda params: {}
  c = experiment.config.evaluation
  table = solving.table(experiment.noising, c)
  sample = sampler(experiment, guidance_scale=c.guidance)
  labels = np.arange(num, dtype=np.int32) % (experiment.examples.num_classes or 1)

  def show(params):
    key = jax.random.key(experiment.config.seed)
    x = draw(sample, params, table, key, labels, chunk=num)
    pixels = np.asarray(image_tasks.grid(x))
    return {"samples": pixels if pixels.ndim == 3 else pixels[..., None]}

  return show


# Of the learned weighting.
_LEVEL = embeddings.level_function()


def _loss(c, model, noising, num_classes):
  """The loss that `config.diffusion` describes."""
  level = precondition.noise_level(noising)
  learned = lambda params, t: _LEVEL.apply(params["level"], None, level(t))
  return denoising.denoising(
    model,
    noising,
    fields.choose("diffusion.weighting", c.weighting, WEIGHTINGS)(c.sigma_data),
    fields.choose("diffusion.times", c.times, TIMES)(noising),
    quantiles=fields.choose("diffusion.quantiles", c.quantiles, QUANTILES),
    num_classes=num_classes,
    drop_condition=c.drop_condition,
    log_variance=learned if c.learned_weighting else None,
  )


def _init(network, learned_weighting, examples, key):
  x = jnp.zeros((1, *examples.train.shape[1:]))
  params = {"network": network.init(key, x)}
  return {**params, "level": _LEVEL.init(key, None)} if learned_weighting else params


def _check(config: fields.Config) -> None:
  fields.check(config, ("train", "evaluation"))
  c = config.diffusion
  for name in ("drop_condition", "clean_share"):
    fields.require(0 <= c[name] <= 1, f"diffusion.{name} is {c[name]}; it is from 0 to 1")
  fields.require(c.sigma_data > 0, f"diffusion.sigma_data is {c.sigma_data}; it is above 0")
  fields.require(c.data_noise >= 0, f"diffusion.data_noise is {c.data_noise}; it is at least 0")
  if "dtype" in config.model:
    fields.choose("model.dtype", config.model.dtype, fields.DTYPES)


def network_config_of(
  config: fields.Config, examples: pixels.Examples
) -> dit.DiTConfig | unet.UNetConfig | mlp.MLPConfig:
  """The shape of the network that `config.model` names, for these examples.

  Raises:
    ValueError: there is none of that name, or it is not for such examples.
  """
  kind = fields.choose("model.network", config.model.network, NETWORKS)
  shape = {"image_shape": examples.train.shape[1:]}
  if kind is mlp.MLPConfig:
    shape = {"dim": examples.train.shape[-1]}
  if len(examples.train.shape) != (2 if kind is mlp.MLPConfig else 4):
    fields.require(
      False,
      f"model.network={config.model.network!r} is not for data of shape "
      f"{examples.train.shape[1:]}; mlp is for points, dit and unet for images",
    )
  chosen = {name: value for name, value in config.model.items() if name != "network"}
  return kind(**shape, num_classes=examples.num_classes, **chosen)


def of_network(
  network: models.Network,
  noising: schedules.Schedule,
  head: precondition.Head,
  sigma_data: float,
) -> denoising.Model:
  """The denoiser whose network's params are those of "network"."""
  inner = denoising.network_denoiser(network, noising, head, sigma_data)

  def model(params, x, t, condition=None, key=None):
    return inner(params["network"], x, t, condition, key)

  return model


def tuned(experiment: Experiment, skip_scale: Any) -> denoising.Model:
  """The model of an experiment with its U-Net's skip connections scaled [num_skips].

  Raises:
    ValueError: its network is no U-Net.
  """
  c = experiment.config.diffusion
  if not isinstance(experiment.network_config, unet.UNetConfig):
    raise ValueError(f"model.network={experiment.config.model.network!r} has no skip connections.")
  network = unet.unet(experiment.network_config, skip_scale=skip_scale)
  return of_network(network, experiment.noising, HEADS[c.head](c.sigma_data), c.sigma_data)


stepping, share, flops = supervised.stepping, supervised.share, supervised.flops


def rules(experiment: Experiment) -> tuple[partition.Rule, ...]:
  """How its parameters are split over devices."""
  c = experiment.network_config
  return partition.rules(c.width // c.num_heads if isinstance(c, dit.DiTConfig) else 1)


def finished(params: models.Params) -> models.Params:
  """Trained parameters are laid out for use as they are."""
  return params


def denoiser(
  model: denoising.Model,
  params: models.Params,
  labels: jax.Array,
  num_classes: int | None,
  guidance_scale: float,
) -> models.Denoiser:
  """E[x_0 | x_t, label], or what guidance makes of it, in one call of the network a step.

  Args:
    model: of the experiment.
    params: of it.
    labels: [B]; not read where there are no classes.
    num_classes: None where there are none.
    guidance_scale: of `guidance.classifier_free`; 1 calls the network on B rows, not on 2 B.
  """
  if num_classes is None:
    return lambda x, t: model(params, x, t)
  condition = models.Condition(labels)
  if guidance_scale == 1:
    return lambda x, t: model(params, x, t, condition)
  both = jnp.concatenate([labels, jnp.full_like(labels, num_classes)])

  def pair(x, t):
    doubled = jnp.concatenate([x, x]), jnp.tile(jnp.broadcast_to(t, x.shape[:1]), 2)
    return jnp.split(model(params, *doubled, models.Condition(both)), 2)

  return guidance.guided(pair, guidance.classifier_free(guidance_scale))


def sampler(
  experiment: Experiment, model: denoising.Model | None = None, guidance_scale: float = 1.0
) -> Callable[..., jax.Array]:
  """A jitted (params, table, keys [B], labels [B]) -> samples [B, ...], a program a table's shape.

  Args:
    experiment: whose images.
    model: in place of its own, of the same params.
    guidance_scale: see `denoiser`.
  """
  model, shape = model or experiment.model, experiment.examples.train.shape[1:]

  @jax.jit
  def sample(params, table, keys, labels):
    num_classes = experiment.examples.num_classes
    denoise = denoiser(model, params, labels, num_classes, guidance_scale)
    return solvers.sample(keys, denoise, table, jnp.zeros((labels.shape[0], *shape)))

  return sample


def draw(
  sample: Callable[..., jax.Array],
  params: models.Params,
  table: tables.SolverTable,
  key: jax.Array,
  labels: np.ndarray,
  *,
  chunk: int,
  on_chunk: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
  """Samples [N, ...] of labels [N], `chunk` at a time; sample i depends on key, i and its label.

  Args:
    sample: see `sampler`.
    params: of the model.
    table: of the solver.
    key: of the run.
    labels: the classes.
    chunk: rows at once; the last rows are filled up, so there is one program.
    on_chunk: told how many are done.
  """
  num = len(labels)
  chunk = min(chunk, num)
  drawn = []
  for first in range(0, num, chunk):
    rows = np.arange(first, first + chunk)
    keys = base.row_keys(key, jnp.asarray(rows))
    made = sample(params, table, keys, jnp.asarray(labels[np.minimum(rows, num - 1)]))
    drawn.append(sharded.to_host(made))
    on_chunk(min(first + chunk, num))
  return np.concatenate(drawn)[:num]
