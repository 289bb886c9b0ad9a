"""Counted FLOPs: against counts by hand, by loops, and XLA's own where that is right."""

import functools
import itertools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from ancestral.models import base, transformer
from ancestral.training import chips, cost, likelihood, optimizer, step
from ancestral.training import state as state_lib


def array(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


LEFT, RIGHT = array(8, 16), array(16, 32)
PRODUCT = 2 * 8 * 16 * 32


def product(x, w):
  return jnp.tanh(x @ w)


def total(x, w):
  return jnp.sum(product(x, w))


def by_xla(fn, *args):
  return jax.jit(fn).lower(*args).cost_analysis()["flops"]


@pytest.mark.parametrize(
  "equation, shapes, expected",
  [
    ("mk,kn->mn", ((8, 16), (16, 32)), 2 * 8 * 16 * 32),
    ("bmk,bkn->bmn", ((3, 8, 16), (3, 16, 32)), 2 * 3 * 8 * 16 * 32),
    ("bkglc,bksc->bkgls", ((2, 3, 4, 5, 6), (2, 3, 7, 6)), 2 * (2 * 3 * 4) * 5 * 7 * 6),
    ("mkj,kjn->mn", ((8, 4, 5), (4, 5, 2)), 2 * 8 * 20 * 2),
    ("k,k->", ((9,), (9,)), 2 * 9),
  ],
)
def test_a_product_is_two_per_multiply_add(equation, shapes, expected):
  fn, args = functools.partial(jnp.einsum, equation), [array(*shape) for shape in shapes]
  assert cost.flops(fn, *args) == expected == by_xla(fn, *args)


def test_what_is_not_a_product_costs_nothing():
  assert cost.flops(lambda x: jnp.sort(jnp.exp(x) + 1), array(5, 5)) == 0


def test_a_gradient_is_three_times_and_rematerialised_four_times():
  gradient = lambda fn: jax.grad(fn, (0, 1))
  assert cost.flops(total, LEFT, RIGHT) == PRODUCT
  assert cost.flops(gradient(total), LEFT, RIGHT) == 3 * PRODUCT
  assert cost.flops(jax.grad(total, 1), LEFT, RIGHT) == 2 * PRODUCT  # none to the input
  assert cost.flops(gradient(jax.checkpoint(total)), LEFT, RIGHT) == 4 * PRODUCT


def test_a_scan_counts_its_length_which_xla_does_not():
  def loop(x, w):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=7)[0]

  square = array(16, 16)
  assert cost.flops(loop, LEFT, square) == 7 * 2 * 8 * 16 * 16
  gradient = jax.grad(lambda x, w: jnp.sum(loop(x, w)), (0, 1))
  assert cost.flops(gradient, LEFT, square) == 3 * 7 * 2 * 8 * 16 * 16
  one = by_xla(lambda x, w: x @ w, LEFT, square)
  assert by_xla(loop, LEFT, square) < 2 * one


def test_a_cond_counts_its_dearest_branch():
  def fn(p, x, w):
    return jax.lax.switch(
      p, [lambda x: x, lambda x: x @ w @ w.T, lambda x: x @ w @ w.T @ x.T @ x], x
    )

  expected = 2 * PRODUCT + 2 * (2 * 8 * 8 * 16)
  assert cost.flops(fn, jax.ShapeDtypeStruct((), jnp.int32), LEFT, RIGHT) == expected


def test_products_in_a_while_loop_are_refused_and_others_are_not():
  fn = lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x @ x, x)
  with pytest.raises(ValueError, match="make it a scan"):
    cost.flops(fn, array(4, 4))
  free = lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x + 1, x)
  assert cost.flops(lambda x, w: free(x) @ w, LEFT, RIGHT) == PRODUCT


def test_calls_of_every_kind_are_looked_into():
  @jax.custom_vjp
  def own(x, w):
    return product(x, w)

  own.defvjp(lambda x, w: (own(x, w), (x, w)), lambda held, g: (g @ held[1].T, held[0].T @ g))
  jumped = jax.custom_jvp(product)
  jumped.defjvp(lambda held, g: (jumped(*held), jumped(*held)))
  for fn in (own, jumped, jax.jit(product), jax.checkpoint(product), jax.jit(jax.jit(product))):
    assert cost.flops(fn, LEFT, RIGHT) == PRODUCT
  assert cost.flops(jax.grad(lambda *a: jnp.sum(own(*a)), (0, 1)), LEFT, RIGHT) == 3 * PRODUCT
  batched = jax.vmap(product, (0, None))
  assert cost.flops(batched, array(5, 8, 16), RIGHT) == 5 * PRODUCT


def test_a_shard_map_counts_on_every_device():
  mesh = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  of_rows = PartitionSpec("data")

  def fn(manual, x, w):
    local = lambda x, w: x @ w
    specs = {"in_specs": (of_rows, PartitionSpec()), "out_specs": of_rows}
    return jax.shard_map(local, mesh=mesh, axis_names=manual, check_vma=False, **specs)(x, w)

  assert cost.flops(functools.partial(fn, {"data"}), LEFT, RIGHT) == PRODUCT
  # Both devices of "model" compute the same product.
  assert cost.flops(functools.partial(fn, {"data", "model"}), LEFT, RIGHT) == 2 * PRODUCT


def test_a_kernel_that_cannot_be_read_is_refused_or_given():
  def fn(x, w):
    sizes = jnp.array([3, 5], jnp.int32)
    return jax.lax.ragged_dot(x, jnp.stack([w, w]), sizes)

  with pytest.raises(ValueError, match=r"FLOPs of ragged_dot\w* cannot be read"):
    cost.flops(fn, LEFT, RIGHT)
  (name,) = {
    equation.primitive.name
    for equation in jax.make_jaxpr(fn)(LEFT, RIGHT).eqns
    if "ragged" in equation.primitive.name
  }
  shape = lambda equation: equation.invars[0].aval.shape
  given = {name: lambda equation: 2 * shape(equation)[0] * shape(equation)[1] * 32}
  assert cost.flops(fn, LEFT, RIGHT, kernels=given) == PRODUCT


CONVOLUTIONS = {
  "valid": {"window_strides": (1, 1), "padding": "VALID"},
  "same": {"window_strides": (1, 1), "padding": "SAME"},
  "strided": {"window_strides": (2, 2), "padding": [(1, 1), (0, 2)]},
  "dilated": {"window_strides": (1, 2), "padding": "SAME", "rhs_dilation": (2, 1)},
  "transposed": {"window_strides": (1, 1), "padding": [(2, 1), (1, 2)], "lhs_dilation": (2, 3)},
  "grouped": {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2},
}


def by_loops(settings, image, kernel):
  """Multiply-adds on elements, one by one, doubled."""
  numbers = ("NHWC", "HWIO", "NHWC")
  fn = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=numbers, **settings)
  out = jax.eval_shape(fn, array(*image), array(*kernel)).shape
  strides, padding = settings["window_strides"], settings["padding"]
  window = settings.get("rhs_dilation", (1, 1))
  dilation = settings.get("lhs_dilation", (1, 1))
  if isinstance(padding, str):
    spans = [(k - 1) * d + 1 for k, d in zip(kernel[:2], window, strict=True)]
    padding = jax.lax.padtype_to_pads(image[1:3], spans, strides, padding)
  pairs = 1
  for axis in range(2):
    side, hits = (image[1 + axis] - 1) * dilation[axis] + 1, 0
    for place, tap in itertools.product(range(out[1 + axis]), range(kernel[axis])):
      at = place * strides[axis] + tap * window[axis] - padding[axis][0]
      hits += 0 <= at < side and at % dilation[axis] == 0
    pairs *= hits
  return fn, 2 * pairs * out[0] * out[3] * kernel[2]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_and_its_gradients_count_taps_on_elements(name):
  settings = CONVOLUTIONS[name]
  image, kernel = (3, 9, 8, 4), (3, 2, 4 // settings.get("feature_group_count", 1), 6)
  fn, expected = by_loops(settings, image, kernel)
  args = array(*image), array(*kernel)
  assert cost.flops(fn, *args) == expected == by_xla(fn, *args)
  gradient = jax.grad(lambda *args: jnp.sum(jnp.sin(fn(*args))), (0, 1))
  assert cost.flops(gradient, *args) == 3 * expected


CONFIG = transformer.TransformerConfig(
  vocab_size=11,
  max_length=12,
  num_layers=3,
  width=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  mlp_width=40,
)


def transformer_by_hand(config, batch, length):
  """(2 N per token, attention): N the parameters that are multiplied with."""
  c, tokens = config, batch * length
  per_layer = 2 * c.width * c.head_dim * (c.num_heads + c.num_kv_heads) + 3 * c.width * c.mlp_width
  weights = c.num_layers * per_layer + c.width * c.vocab_size
  attention = c.num_layers * 2 * (2 * batch * c.num_heads * length * length * c.head_dim)
  return 2 * weights * tokens + attention


@pytest.mark.parametrize("scan", [True, False])
def test_a_transformer_is_two_per_weight_and_token_and_its_attention(scan):
  model = transformer.transformer(CONFIG)
  tokens = jax.ShapeDtypeStruct((2, 12), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)
  if not scan:
    params = jax.eval_shape(transformer.unstack, params)
  fn = lambda params, tokens: model.readout(params, base.apply(model, params, tokens)[0])
  forward = transformer_by_hand(CONFIG, 2, 12)
  assert cost.flops(fn, params, tokens) == forward
  gradient = jax.grad(lambda params, tokens: jnp.sum(jnp.sin(fn(params, tokens))))
  assert cost.flops(gradient, params, tokens) == 3 * forward


def test_a_step_of_training_in_microbatches_costs_the_same():
  model = transformer.transformer(CONFIG)
  loss_fn = likelihood.next_token(model)
  batch = {name: jax.ShapeDtypeStruct((4, 12), jnp.int32) for name in ("tokens", "targets")}
  batch["mask"] = array(4, 12)
  adam = optimizer.adamw(optax.constant_schedule(1e-3), weight_decay=0.0, clip_norm=1.0)
  init = lambda key: state_lib.init(
    key,
    lambda key: model.init(key, jnp.zeros((1, 12), jnp.int32)),
    adam,
    state_lib.no_average(),
  )
  state = jax.eval_shape(init, jax.random.key(0))
  for count in (1, 2):
    run = functools.partial(
      step.train_step,
      loss_fn=loss_fn,
      optimizer=adam,
      averaging=state_lib.no_average(),
      num_microbatches=count,
    )
    found = cost.flops(jax.jit(run), jax.random.key(0), state, batch)
    again = 2 * (4 * 12) * CONFIG.width * CONFIG.vocab_size  # logits are not kept for the gradient
    assert found == 3 * transformer_by_hand(CONFIG, 4, 12) + again


def test_chips_are_known_by_what_jax_calls_them():
  assert chips.chip(jax.devices("cpu")[0].device_kind) is None
  assert chips.peak_flops("cpu") is None
  assert chips.peak_flops("NVIDIA H200") == chips.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
  assert chips.chip("TPU v5 lite").name == "TPU v5e" and chips.chip("TPU v5").name == "TPU v5p"
  for found in chips.BY_KIND.values():  # bytes, not gigabytes; a chip computes more than it moves
    assert 1e12 > found.memory > 1e10 > 0 and 10 < found.flops / found.bandwidth < 1000
    assert found.interconnect < found.bandwidth


def test_jax_calls_tpus_so():
  info = pytest.importorskip("jax._src.pallas.mosaic.tpu_info")  # private: another may lack it
  known = getattr(info, "chip_version_from_device_kind", None)
  if known is None:
    pytest.skip("this jax keeps its table elsewhere")
  tpus = [kind for kind in chips.BY_KIND if kind.startswith("TPU")]
  assert tpus and all(known(kind) is not None for kind in tpus)
