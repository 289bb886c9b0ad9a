"""Judges of steps, and what is kept of a bad one."""

import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.training import guard, loop, metrics, state


def test_finite_names_the_first_value_that_is_not():
  assert guard.finite({"loss": 1.0, "gradient_norm": 2.0}) is None
  assert guard.finite({"loss": 1.0, "gradient_norm": float("inf")}) == "gradient_norm is inf"
  assert guard.finite({"loss": float("nan")}) == "loss is nan"


def judged(judge, losses):
  return [judge({"loss": loss}) for loss in losses]


def test_a_spike_is_measured_in_deviations_of_the_median():
  # Of 1, 2, 3, 4, 100 the median is 3, the deviations 2, 1, 0, 1, 97, their median 1.
  window, factor = [1.0, 2.0, 3.0, 4.0, 100.0], 5.0
  limit = 3 + factor / 0.6745
  for loss, bad in [(limit - 1e-6, False), (limit + 1e-6, True), (-100.0, False)]:
    *before, last = judged(guard.spikes(factor, window=5), [*window, loss])
    assert before == [None] * 5 and (last is not None) == bad
  assert last is None
  why = judged(guard.spikes(5.0, window=5), [*window, 103.0])[-1]
  assert why == "loss is 103, 67.5 deviations above 3, its recent median,"


def test_a_spike_does_not_depend_on_the_losss_origin_or_unit():
  losses = np.random.default_rng(0).standard_t(2, 400)
  found = lambda losses: [why is not None for why in judged(guard.spikes(4.0, window=50), losses)]
  plain = found(losses)
  assert 0 < sum(plain) < 30
  assert found(losses * 8 - 1024) == plain


def test_nothing_is_a_spike_before_the_window_is_full_or_in_a_constant():
  assert judged(guard.spikes(3.5, window=4), [1.0, 2.0, 1e9, 1e12]) == [None] * 4
  assert judged(guard.spikes(3.5, window=3), [1.0, 1.0, 1.0, 9.0]) == [None] * 4


def test_the_window_slides():
  judge = guard.spikes(3.5, window=3)
  # 50 is no spike after 51, 52, 53 and would be one after 1, 2, 3.
  assert judged(judge, [1.0, 2.0, 3.0])[-1] is None
  assert judge({"loss": 51.0}) is not None
  judged(judge, [52.0, 53.0])
  assert judge({"loss": 50.0}) is None


@pytest.mark.parametrize("factor, window", [(0.0, 9), (-1.0, 9), (float("nan"), 9), (3.0, 1)])
def test_a_rule_that_means_nothing_is_refused(factor, window):
  with pytest.raises(ValueError, match="the factor is positive"):
    guard.spikes(factor, window=window)


def test_the_first_judge_that_finds_something_speaks():
  seen = []
  second = lambda scalars: seen.append(scalars["loss"])
  judge = guard.first_of(guard.finite, second)
  assert judged(judge, [1.0, float("inf"), 2.0]) == [None, "loss is inf", None]
  assert seen == [1.0, 2.0]


def test_a_bad_batch_is_saved_by_the_paths_of_its_leaves(tmp_path):
  batch = {
    "chosen": {"tokens": np.arange(6, dtype=np.int32).reshape(2, 3)},
    "mask": jnp.array([True, False]),
    "image": jnp.array([[0.1, 2.0]], jnp.bfloat16),
  }
  scalars = {"loss": float("nan"), "gradient_norm": 2.5}
  bad = loop.Diverged("loss is nan", 7, batch, scalars)
  for _ in range(2):  # the second run of the same replaces it
    folder = guard.save(tmp_path / "diverged", bad)
  assert folder == tmp_path / "diverged" / "step_7"
  with np.load(folder / "batch_0.npz") as held:
    assert set(held) == {"chosen/tokens", "mask", "image"}
    np.testing.assert_array_equal(held["chosen/tokens"], batch["chosen"]["tokens"])
    assert held["chosen/tokens"].dtype == np.int32 and held["mask"].tolist() == [True, False]
    np.testing.assert_array_equal(held["image"], np.asarray(batch["image"], np.float32))
  assert json.loads((folder / "metrics.json").read_text()) == {
    "step": 7,
    "loss": "NaN",
    "gradient_norm": 2.5,
  }
  assert metrics.read_jsonl(folder / "metrics.json")[0]["gradient_norm"] == 2.5


def test_a_batch_may_be_one_array(tmp_path):
  folder = guard.save(tmp_path, loop.Diverged("loss is nan", 1, np.ones((2, 2)), {}))
  with np.load(folder / "batch_0.npz") as held:
    assert held["batch"].tolist() == [[1, 1], [1, 1]]


PROCESS = """
import sys
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
port, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from ancestral.training import guard, loop
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
whole = np.arange(16.0).reshape(4, 4)
def place(spec):
  return jax.make_array_from_callback((4, 4), NamedSharding(mesh, spec), whole.__getitem__)
batch = {"rows": place(P("data")), "cut": place(P("data", "model")), "own": np.full(2, index)}
guard.save(folder, loop.Diverged("loss is nan", 3, batch, {"loss": 1.0}))
"""


def test_every_process_saves_its_share(tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, port, str(index), str(tmp_path)],
      stderr=subprocess.PIPE, text=True, env=environment,
    )
    for index in range(2)
  ]  # fmt: skip
  errors = [process.communicate(timeout=120)[1] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], errors
  whole, folder = np.arange(16.0).reshape(4, 4), tmp_path / "step_3"
  assert sorted(path.name for path in folder.iterdir()) == [
    "batch_0.npz",
    "batch_1.npz",
    "metrics.json",
  ]
  for index in range(2):
    rows = slice(2 * index, 2 * index + 2)
    with np.load(folder / f"batch_{index}.npz") as held:
      where = f"{rows.start}:{rows.stop}"
      cuts = {f"cut[{where},{a}:{b}]": whole[rows, a:b] for a, b in ((0, 2), (2, 4))}
      expected = {f"rows[{where},0:4]": whole[rows], "own": np.full(2, index), **cuts}
      assert set(held) == set(expected)
      for name, array in expected.items():
        np.testing.assert_array_equal(held[name], array)


def test_a_run_that_diverges_leaves_its_last_good_save_and_the_batch(tmp_path):
  """Descent on x -> x^2 with a step that is too long, from one batch that is poisoned."""
  saved = []

  @jax.jit
  def step(held, batch):
    loss, gradient = jax.value_and_grad(lambda x: jnp.mean(x * batch["scale"]) ** 2)(held.params)
    params = held.params - 0.1 * gradient
    scalars = {"loss": loss, "gradient_norm": jnp.abs(gradient)}
    return held._replace(step=held.step + 1, params=params), scalars

  scales = np.random.default_rng(0).uniform(1, 1.1, 60)
  scales[33] = 1e4
  batches = ({"scale": np.full(3, scale, np.float32)} for scale in scales)

  judge = guard.first_of(guard.finite, guard.spikes(20.0, window=16))
  with pytest.raises(loop.Diverged, match=r"loss is .* deviations above .* at step 34") as error:
    loop.fit(
      state.TrainState(jnp.int32(0), jnp.float32(1), (), ()),
      batches,
      step,
      num_steps=60,
      write=loop.Every(50, lambda done, scalars: None),
      evaluate=loop.Every(50, lambda done, held: None),
      save=loop.Every(4, lambda done, held: saved.append((done, float(held.params)))),
      judge=judge,
    )
  assert saved[-1][0] == 32 and abs(saved[-1][1]) < 1
  with np.load(guard.save(tmp_path, error.value) / "batch_0.npz") as held:
    assert held["scale"].tolist() == [1e4] * 3


def test_a_round_without_a_loss_is_no_spike():
  judge = guard.spikes(3.0, window=2)
  assert [judge(scalars) for scalars in ({"loss": 1.0}, {"selected": 0.0}, {"loss": 1.1})] == [
    None
  ] * 3
