"""Params in one safetensors file: bit for bit, whole or not at all, and readable by the package."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from ancestral.models import flat_safetensors

PARAMS = {
  "block_0": {"kernel": np.arange(6.0).reshape(2, 3).T, "bias": np.array(3, np.int32)},
  "half": jnp.arange(4, dtype=jnp.bfloat16),
  "flags": np.array([True, False]),
  "odd": np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
}
RECORD = {"kind": "dit", "image_shape": [8, 8, 3], "dropout": 0.1, "text_width": None}


def test_params_and_record_come_back_bit_for_bit(tmp_path):
  path = tmp_path / "new" / "params.safetensors"
  flat_safetensors.write(path, PARAMS, RECORD)
  params, record = flat_safetensors.read(path)
  assert record == RECORD
  assert jax.tree.structure(params) == jax.tree.structure(PARAMS)
  for found, given in zip(jax.tree.leaves(params), jax.tree.leaves(PARAMS), strict=True):
    given = np.asarray(given)
    assert type(found) is np.ndarray and (found.dtype, found.shape) == (given.dtype, given.shape)
    assert found.tobytes() == given.tobytes()  # in the order of the axes, whatever the memory's
  assert params["half"].dtype == ml_dtypes.bfloat16
  assert [file.name for file in path.parent.iterdir()] == ["params.safetensors"]


def test_names_are_paths(tmp_path):
  flat_safetensors.write(tmp_path / "params", PARAMS, None)
  found = safetensors_numpy.load_file(tmp_path / "params")
  assert set(found) == {"block_0/kernel", "block_0/bias", "half", "flags", "odd"}
  np.testing.assert_array_equal(found["block_0/kernel"], [[0, 3], [1, 4], [2, 5]])


def test_a_write_that_fails_leaves_the_file_before_it(tmp_path, monkeypatch):
  path = tmp_path / "params"
  flat_safetensors.write(path, {"a": np.ones(3)}, 1)
  before = path.read_bytes()

  def half(tensors, file, metadata):
    file.write_bytes(before[:10])
    raise OSError("No space left on device")

  monkeypatch.setattr(safetensors_numpy, "save_file", half)
  with pytest.raises(OSError, match="No space"):
    flat_safetensors.write(path, {"a": np.zeros(3)}, 2)
  monkeypatch.undo()
  assert path.read_bytes() == before
  flat_safetensors.write(path, {"a": np.zeros(3)}, 3)  # what is left beside it is in nobody's way
  assert flat_safetensors.read(path)[1] == 3


@pytest.mark.parametrize(
  "params, message",
  [
    ({"layers": [np.ones(2)]}, "layers is a list"),
    ({"a": {"b": None}}, "a/b is a NoneType"),
    (np.ones(3), "the whole is a ndarray"),
    ({"a/b": np.ones(3)}, "a name 'a/b'"),
    ({0: np.ones(3)}, "a name 0"),
    ({"a": {}}, "dictionary a is empty"),
  ],
)
def test_what_would_not_come_back_is_refused(tmp_path, params, message):
  with pytest.raises(ValueError, match=message):
    flat_safetensors.write(tmp_path / "params", params, {})
  assert not list(tmp_path.iterdir())


def test_files_that_are_not_of_this_layout_are_refused(tmp_path):
  path = tmp_path / "params"
  with pytest.raises(FileNotFoundError, match="params is not there"):
    flat_safetensors.read(path)
  safetensors_numpy.save_file({"a": np.ones(3)}, path, {"format": "pt"})
  with pytest.raises(ValueError, match="format='pt' in its metadata"):
    flat_safetensors.read(path)
  flat_safetensors.write(path, PARAMS, {})
  whole = path.read_bytes()
  for size in (0, 4, 100, len(whole) - 1):
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
      flat_safetensors.read(path)
