"""What every sampler keeps, crossed with every sampler; a new one is a row in their cases."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance_cases import CASES, Case

import targets
from ancestral.sampling import base, sharded


class Compiled(NamedTuple):
  case: Case
  sample: Callable  # (params, keys, inputs) -> dict, compiled
  function: Callable  # the same, not compiled
  traces: list


REQUESTS = [0, 1, 2, 3]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def compiled(request):
  case, traces = request.param, []

  def function(params, keys, inputs):
    traces.append(1)
    algorithm = case.algorithm(params)
    state = base.start(keys, algorithm, inputs)
    return case.sample(base.run(keys, algorithm, state, case.num_steps)[0])

  return Compiled(case, jax.jit(function), function, traces)


def sample_of(compiled, requests=tuple(REQUESTS), seed=0):
  requests = list(requests)
  return compiled.sample(
    compiled.case.params, targets.keys_of(requests, seed), compiled.case.inputs(requests)
  )


def assert_same(one, other):
  """Integers equal; floats to the rounding that another program order allows."""
  assert one.keys() == other.keys()
  for name, leaf in one.items():
    exact = jnp.issubdtype(leaf.dtype, jnp.integer)
    np.testing.assert_allclose(
      np.asarray(leaf), np.asarray(other[name]), err_msg=name, atol=0 if exact else 1e-4, rtol=0
    )


def test_dtypes(compiled):
  out = sample_of(compiled)
  assert {name: str(leaf.dtype) for name, leaf in out.items()} == compiled.case.dtypes
  assert all(leaf.shape[0] == 4 for leaf in out.values())
  assert all(np.all(np.isfinite(leaf)) for leaf in out.values())


def test_steps_by_hand_equal_the_scan(compiled):
  """Stepping without a loop, each step its own program, with the keys of the driver's rule."""
  case, keys = compiled.case, targets.keys_of(REQUESTS)
  step = jax.jit(lambda params, keys, state: case.algorithm(params).step(keys, state)[0])
  state = jax.jit(lambda params, keys, inputs: base.start(keys, case.algorithm(params), inputs))(
    case.params, keys, case.inputs(REQUESTS)
  )
  for _ in range(case.num_steps):
    state = step(case.params, jax.vmap(jax.random.fold_in)(keys, state.step), state)
  assert_same(case.sample(state), sample_of(compiled))


@pytest.mark.parametrize(
  "compiled", [case for case in CASES if case.eager], indirect=True, ids=lambda case: case.name
)
def test_eager_equals_compiled(compiled):
  case, keys = compiled.case, targets.keys_of(REQUESTS)
  algorithm = case.algorithm(case.params)
  eager = base.start(keys, algorithm, case.inputs(REQUESTS))
  eager, _ = algorithm.step(base.row_keys_at(keys, eager.step), eager)
  one = jax.jit(
    lambda params, keys, inputs: case.sample(
      base.run(keys, case.algorithm(params), base.start(keys, case.algorithm(params), inputs), 1)[0]
    )
  )
  assert_same(case.sample(eager), one(case.params, keys, case.inputs(REQUESTS)))


def test_vmap_over_an_outer_axis_equals_the_parts(compiled):
  groups = [[0, 1], [3, 2], [1, 0]]
  keys = jnp.stack([targets.keys_of(group, seed) for seed, group in enumerate(groups)])
  inputs = jax.tree.map(
    lambda *leaves: jnp.stack(leaves), *(compiled.case.inputs(group) for group in groups)
  )
  out = jax.jit(jax.vmap(compiled.function, in_axes=(None, 0, 0)))(
    compiled.case.params, keys, inputs
  )
  for i, group in enumerate(groups):
    alone = sample_of(compiled, [*group, 0, 0], i)  # the batch that is compiled already
    assert_same(
      jax.tree.map(lambda leaf, i=i: leaf[i], out), jax.tree.map(lambda leaf: leaf[:2], alone)
    )


def test_pmap_over_devices_equals_the_batch(compiled):
  case = compiled.case
  sample = sharded.pmapped(
    lambda params, settings, keys, inputs: compiled.function(params, keys, inputs)
  )
  out = sample(case.params, {}, targets.keys_of(REQUESTS), case.inputs(REQUESTS))
  assert_same(out, sample_of(compiled))


def test_keys_decide_everything(compiled):
  first, again, other = (sample_of(compiled, seed=seed) for seed in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  changed = any(np.any(first[name] != other[name]) for name in first)
  assert changed == compiled.case.draws


def test_rows_do_not_know_each_other(compiled):
  together = sample_of(compiled)
  for requests in ([3, 2, 1, 0], [2, 2, 2, 2], [0, 1, 1, 3]):
    out = sample_of(compiled, requests)
    assert_same(out, jax.tree.map(lambda leaf, r=requests: leaf[np.array(r)], together))


def test_compiles_once_for_all_inputs_and_params(compiled):
  first = sample_of(compiled)
  traced = len(compiled.traces)
  out = compiled.sample(
    jax.tree.map(lambda leaf: -leaf, compiled.case.params),
    targets.keys_of([9, 8, 7, 6]),
    compiled.case.inputs([3, 2, 1, 0]),
  )
  assert len(compiled.traces) == traced
  assert any(np.any(first[name] != out[name]) for name in first)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(compiled, platform):
  args = compiled.case.params, targets.keys_of(REQUESTS), compiled.case.inputs(REQUESTS)
  lowered = jax.jit(compiled.function).trace(*args).lower(lowering_platforms=(platform,))
  assert "stablehlo" in lowered.as_text()
