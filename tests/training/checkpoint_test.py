"""Checkpoints: bitwise round trips, damage of every kind, retention, and clear refusals."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging as absl_logging

from ancestral.training import checkpoint


class State(NamedTuple):
  step: Any
  params: Any
  optimizer: Any
  ema: Any
  extra: Any


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def state_at(step, width=64):
  a, b, c = jax.random.split(jax.random.key(step), 3)
  params = {
    "layers": [{"kernel": jax.random.normal(a, (width, 33)), "bias": jnp.zeros((33,))}],
    "head": {"scale.x/y": jax.random.normal(b, (7,), jnp.bfloat16)},
  }
  optimizer = OPTIMIZER.init(params)
  extra = {"flags": jnp.array([True, False]), "small": jnp.arange(5, dtype=jnp.int8), "key": c}
  ema = jax.tree.map(lambda x: x + 1, params)
  return State(jnp.int32(step), params, optimizer, ema, extra)


def bits(tree):
  plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return [
    (jax.tree_util.keystr(p), str(x.dtype), x.shape, np.asarray(plain(x)).tobytes())
    for p, x in jax.tree.leaves_with_path(tree)
  ]


def abstract():
  return jax.eval_shape(lambda: state_at(0))


CONFIG = {"model": {"width": 64, "heads": [1, 2]}, "seed": 0}


def write(directory, steps, **kwargs):
  with checkpoint.open_manager(directory, **kwargs) as manager:
    for step in steps:
      checkpoint.save(
        manager, step, state_at(step), {"next": step}, CONFIG, {"accuracy": -abs(step - 2.0)}
      )


def read(directory, **kwargs):
  with checkpoint.open_manager(directory, create=False) as manager:
    return checkpoint.restore(manager, abstract(), **kwargs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  directory = tmp_path_factory.mktemp("saved") / "checkpoints"
  write(directory, [10, 20])
  return directory


@pytest.fixture
def warned(monkeypatch):
  lines = []
  monkeypatch.setattr(
    absl_logging, "warning", lambda text, *args, **kwargs: lines.append(text % args)
  )
  return lines


def test_round_trip_is_bitwise(saved):
  restored = read(saved)
  assert bits(restored.state) == bits(state_at(20))
  assert jax.tree.structure(restored.state) == jax.tree.structure(state_at(20))
  assert (restored.step, restored.data_state, restored.config) == (20, {"next": 20}, CONFIG)
  assert bits(read(saved, step=10).state) == bits(state_at(10))
  assert checkpoint.load_config(saved) == CONFIG


def test_donated_buffers_do_not_reach_the_file(tmp_path):
  update = jax.jit(lambda x: x * -1.5 + 7, donate_argnums=0)
  with checkpoint.open_manager(tmp_path) as manager:
    x = jnp.arange(3_000_000, dtype=jnp.float32)
    expected = np.array(x)
    checkpoint.save(manager, 1, {"x": x})
    for _ in range(5):
      x = update(x)
    x.block_until_ready()
    found = checkpoint.restore(manager, jax.eval_shape(lambda: {"x": jnp.zeros(3_000_000)}))
  np.testing.assert_array_equal(found.state["x"], expected)


def damage(kind, path):
  size = path.stat().st_size
  if kind == "delete":
    path.unlink()
  elif kind == "truncate":
    os.truncate(path, size // 2)
  elif kind == "empty":
    os.truncate(path, 0)
  else:
    content = bytearray(path.read_bytes())
    at = int(kind * (size - 1))
    content[at] ^= 0x10
    path.write_bytes(content)


def files(directory):
  return sorted(p.relative_to(directory) for p in directory.rglob("*") if p.is_file())


SLOWLY = [
  pytest.param(kind, marks=pytest.mark.slow) for kind in ("delete", "empty", 0.0, 0.77, 1.0)
]


@pytest.mark.parametrize("kind", ["truncate", 0.4, *SLOWLY])
def test_damage_is_seen_or_harmless(saved, tmp_path, warned, kind):
  good, previous = bits(state_at(20)), bits(state_at(10))
  fell_back = []
  for name in files(saved / "20"):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    damage(kind, copy / "20" / name)
    warned.clear()
    restored = read(copy)
    if restored.step == 10:
      fell_back.append(name)
      assert bits(restored.state) == previous and restored.data_state == {"next": 10}
      assert any(f"checkpoint {copy / '20'} " in line for line in warned), name
    else:
      assert bits(restored.state) == good and restored.data_state == {"next": 20}
      assert restored.config == CONFIG
    shutil.rmtree(copy)
  names = {str(n) for n in fell_back}
  assert {"record/metadata", "state/manifest.ocdbt"} <= names


@pytest.mark.slow
def test_array_bytes_flipped_everywhere_are_never_silent(tmp_path):
  with checkpoint.open_manager(tmp_path / "c") as manager:
    x = jax.random.normal(jax.random.key(0), (40, 50))
    checkpoint.save(manager, 1, {"x": x})
  data = max((tmp_path / "c" / p for p in files(tmp_path / "c")), key=lambda p: p.stat().st_size)
  content = data.read_bytes()
  shape = jax.eval_shape(lambda: {"x": jnp.zeros((40, 50))})
  seen = 0
  for at in np.linspace(0, len(content) - 1, 24).astype(int):
    broken = bytearray(content)
    broken[at] ^= 1 << int(at % 8)
    data.write_bytes(broken)
    with checkpoint.open_manager(tmp_path / "c", create=False) as manager:
      try:
        found = checkpoint.restore(manager, shape)
      except checkpoint.CorruptCheckpointError:
        seen += 1
      else:
        np.testing.assert_array_equal(found.state["x"], x)
  assert seen >= 20


def test_all_corrupt_names_each_and_a_chosen_step_does_not_fall_back(saved, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(saved, copy)
  damage(0.5, copy / "20" / "record" / "metadata")
  with pytest.raises(checkpoint.CorruptCheckpointError, match=r"no usable checkpoint: .*20 \("):
    read(copy, step=20)
  damage("empty", copy / "10" / "record" / "metadata")
  both = r"/20 \(.*; .*/10 \(JSONDecodeError.*: restore a backup"
  with pytest.raises(ValueError, match=both) as e:
    read(copy)
  assert "\n" not in str(e.value)


def test_a_run_wound_back_saves_over_nothing(saved, tmp_path, warned):
  copy = tmp_path / "copy"
  shutil.copytree(saved, copy)
  damage("empty", copy / "20" / "record" / "metadata")
  before = files(copy / "20")
  with checkpoint.open_manager(copy) as manager:
    assert checkpoint.restore(manager, abstract()).step == 10
    checkpoint.save(manager, 20, state_at(21), {"next": 21}, CONFIG)
  assert files(copy / "20.set_aside_0") == before
  assert any("is set aside as" in line for line in warned)
  with checkpoint.open_manager(copy) as manager:
    assert list(manager.all_steps()) == [10, 20]
    assert bits(checkpoint.restore(manager, abstract()).state) == bits(state_at(21))
    checkpoint.save(manager, 20, state_at(22), {"next": 22}, CONFIG)
  assert (copy / "20.set_aside_1").is_dir() and (copy / "20.set_aside_0").is_dir()


def test_keeps_the_latest_and_the_best_across_reopening(tmp_path):
  best = lambda metrics: metrics["accuracy"]
  write(tmp_path, [1, 2, 3], keep=2, best=best)
  write(tmp_path, [4, 5, 6], keep=2, best=best)
  with checkpoint.open_manager(tmp_path, best=best, keep=2) as manager:
    assert sorted(manager.all_steps()) == [2, 5, 6]
    assert checkpoint.best_step(manager, best) == 2
    checkpoint.save(manager, 7, state_at(7), metrics={"accuracy": float("nan")})
    checkpoint.save(manager, 8, state_at(8), metrics={"accuracy": 5.0})
    checkpoint.save(manager, 9, state_at(9))
    checkpoint.save(manager, 10, state_at(10), metrics={"other": 1.0})
    manager.wait_until_finished()
    assert sorted(manager.all_steps()) == [8, 9, 10]
    assert checkpoint.best_step(manager, best) == 8
    with pytest.raises(FileNotFoundError, match="no checkpoint with a score"):
      checkpoint.best_step(manager, lambda metrics: metrics["absent"])


def test_part_of_a_state_restores_without_the_rest(saved):
  with checkpoint.open_manager(saved, create=False) as manager:
    params = jax.eval_shape(lambda: state_at(0).params)
    for name in ("params", "ema"):
      found = checkpoint.restore_part(manager, params, name)
      assert bits(found.state) == bits(getattr(state_at(20), name)) and found.config == CONFIG
    shape = params["layers"][0]["kernel"]
    kernel = checkpoint.restore_part(manager, shape, "params/layers/0/kernel").state
    np.testing.assert_array_equal(kernel, state_at(20).params["layers"][0]["kernel"])
    with pytest.raises(ValueError, match="has no leaf average/head/scale"):
      checkpoint.restore_part(manager, params, "average")


def test_mismatches_name_the_leaf_and_both_shapes(saved):
  before = {p: (saved / p).read_bytes() for p in files(saved)}
  cases = [
    (jax.eval_shape(lambda: state_at(0, width=8)),
     r"/20 has leaf params/layers/0/kernel as \(64, 33\) float32 where \(8, 33\) float32"),
    (abstract()._replace(ema=None), r"has leaf ema/head/scale.x/y \(7,\) bfloat16, which this"),
    (abstract()._replace(step=jax.ShapeDtypeStruct((), jnp.float32)), r"leaf step as \(\) int32"),
    (abstract()._replace(extra={"new": jnp.zeros(2)}), r"no leaf extra/new \(2,\) float32: use"),
  ]  # fmt: skip
  with checkpoint.open_manager(saved) as manager:
    for wanted, message in cases:
      with pytest.raises(checkpoint.MismatchError, match=message) as e:
        checkpoint.restore(manager, wanted)
      assert "\n" not in str(e.value)
  assert {p: (saved / p).read_bytes() for p in files(saved)} == before


def test_missing_checkpoints_are_named(saved, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no checkpoint directory .*/none: train first"):
    checkpoint.load_config(tmp_path / "none")
  assert not (tmp_path / "none").exists()
  with checkpoint.open_manager(tmp_path) as manager:
    with pytest.raises(FileNotFoundError, match=rf"no checkpoint in {tmp_path}"):
      checkpoint.restore(manager, abstract())
  with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 15 .*\(steps: \[10, 20\]\)"):
    read(saved, step=15)


def test_check_config_names_the_first_field_that_differs():
  saved = {"model": {"width": 64, "heads": [1, 2]}, "steps": 10}
  checkpoint.check_config(saved, {"model": {"width": 64, "heads": [1, 2]}, "steps": 10})
  checkpoint.check_config(saved, {**saved, "steps": 20}, ignore=("steps",))
  with pytest.raises(ValueError, match=r"config\.model\.heads is \[1\] but .* has \[1, 2\]: set"):
    checkpoint.check_config(saved, {"model": {"width": 64, "heads": [1]}, "steps": 9})
  with pytest.raises(ValueError, match=r'config\.depth is 3 but the checkpoint has "\(absent\)"'):
    checkpoint.check_config(saved, {**saved, "depth": 3})


def test_restores_into_the_shardings_that_are_asked_for(saved):
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  place = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)
  params = jax.tree.map(place, jax.eval_shape(lambda: state_at(0).params))
  with checkpoint.open_manager(saved, create=False) as manager:
    found = checkpoint.restore_part(manager, params, "params").state
  assert {x.sharding for x in jax.tree.leaves(found)} == {sharding}
  assert bits(found) == bits(state_at(20).params)


KILLED = """
import sys
import jax.numpy as jnp
from ancestral.training import checkpoint
with checkpoint.open_manager(sys.argv[1], keep=2) as manager:
  x = jnp.arange(4_000_000, dtype=jnp.float32)
  for step in range(1, 10_000):
    checkpoint.save(manager, step, {"x": x + step}, {"next": step})
    print(step, flush=True)
"""


def test_killed_while_saving_leaves_an_earlier_checkpoint(tmp_path):
  for delay in (0.0, 0.03):
    child = subprocess.Popen(
      [sys.executable, "-c", KILLED, str(tmp_path / "c")],
      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    for _ in range(3):
      line = child.stdout.readline()
    time.sleep(delay)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    with checkpoint.open_manager(tmp_path / "c") as manager:
      found = checkpoint.restore(manager, jax.eval_shape(lambda: {"x": jnp.zeros(4_000_000)}))
      assert found.step >= int(line) - 1 and found.data_state == {"next": found.step}
      expected = np.arange(4_000_000, dtype=np.float32) + np.float32(found.step)
      np.testing.assert_array_equal(found.state["x"], expected)
    left = [p.name for p in pathlib.Path(tmp_path / "c").iterdir() if not p.name.isdigit()]
    assert not [name for name in left if "tmp" in name]
