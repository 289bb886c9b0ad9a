"""Checkpoints: on which device a parameter goes, what the host holds meanwhile, what is written."""

import dataclasses
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import targets
from ancestral.models import families, partition, pretrained, safetensors_files, transformer

GPT2 = {
  "norm": "layer",
  "gated_mlp": False,
  "activation": "gelu_tanh",
  "use_bias": True,
  "positions": "learned",
}
WIDE = {"width": 64, "num_heads": 8, "num_kv_heads": 8, "vocab_size": 64, "mlp_width": 128}


def fixed(**fields):
  config = targets.tiny_config(**fields)
  return config, targets.fixed_params(transformer.transformer(config))


def check_same(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_host_holds_one_parameter_at_a_time(tmp_path, stacked, dtype):
  config, params = fixed(num_layers=6, width=256, num_heads=4, vocab_size=2000)
  pretrained.write(tmp_path / "model", config, params)
  tree = pretrained.shapes(config, stacked=stacked, dtype=dtype or "float32")
  sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)]
  room = max(sizes) + 500_000
  assert sum(sizes) > (2 if stacked else 5) * room
  pretrained.read(tmp_path / "model", dtype=dtype, stacked=stacked)  # what is compiled and cached
  beyond = []
  for _ in range(5):  # another thread may be late to let go of what it copied from
    tracemalloc.start()
    try:
      _, read = pretrained.read(tmp_path / "model", dtype=dtype, stacked=stacked)
      held, peak = tracemalloc.get_traced_memory()  # what jax took over without a copy is in both
    finally:
      tracemalloc.stop()
    beyond.append(peak - held)
    assert len(jax.tree.leaves(read)) == len(sizes)
  assert min(beyond) < room


def test_nothing_is_placed_before_all_is_known_to_fit(tmp_path):
  config, params = fixed()
  pretrained.write(tmp_path / "model", config, params, max_shard_bytes=6000)
  last = sorted((tmp_path / "model").glob("*.safetensors"))[-1]
  last.write_bytes(last.read_bytes()[:-1])
  placed = []
  with pytest.raises(ValueError, match="cut off"):
    pretrained.read(tmp_path / "model", place=lambda path, leaf: placed.append(path))
  assert not placed


def test_place_is_asked_for_every_parameter_as_it_will_be(tmp_path):
  config, params = fixed(tied_embeddings=False)
  pretrained.write(tmp_path / "model", config, params)
  for stacked, dtype in ((True, "bfloat16"), (False, None)):
    asked = {}

    def place(path, leaf, asked=asked):
      asked[jax.tree_util.keystr(path, simple=True, separator="/")] = (leaf.shape, leaf.dtype)

    _, read = pretrained.read(tmp_path / "model", place=place, stacked=stacked, dtype=dtype)
    expected = pretrained.shapes(config, stacked=stacked, dtype=dtype or "float32")
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      assert asked.pop(name) == (leaf.shape, leaf.dtype)
    assert not asked
    assert jax.tree.map(lambda x: (x.shape, x.dtype), read) == jax.tree.map(
      lambda x: (x.shape, x.dtype), expected
    )


def eight_devices_hold_their_shards(tmp_path):
  mesh = partition.make_mesh(fsdp=2, tensor=2)
  for name, fields in {"llama": {}, "gpt2": GPT2}.items():
    config, params = fixed(**WIDE, **fields)
    pretrained.write(tmp_path / name, config, params)
    rules = partition.rules(head_dim=8)
    for stacked, dtype in ((False, None), (True, "bfloat16")):
      tree = pretrained.shapes(config, stacked=stacked)
      wanted = partition.shardings(tree, mesh, rules)
      flat = dict(jax.tree_util.tree_leaves_with_path(wanted))
      _, read = pretrained.read(
        tmp_path / name, place=lambda path, leaf, f=flat: f[path], dtype=dtype, stacked=stacked
      )
      given = params if stacked else transformer.unstack(params)
      check_same(read, jax.tree.map(lambda leaf, d=dtype: leaf.astype(d or leaf.dtype), given))
      for leaf, sharding in zip(jax.tree.leaves(read), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == sharding
      split = [leaf for leaf in jax.tree.leaves(read) if not leaf.is_fully_replicated]
      assert len(split) > len(jax.tree.leaves(read)) / 3
      assert pretrained.write(tmp_path / f"{name}_{stacked}", config, read) == name
    written = pretrained.read(tmp_path / f"{name}_False")[1]
    check_same(written, transformer.unstack(params))


def eight_devices_read_no_shard_twice(tmp_path, monkeypatch):
  config, params = fixed(**WIDE)
  pretrained.write(tmp_path / "model", config, params)
  mesh, rules = partition.make_mesh(fsdp=2, tensor=2), partition.rules(head_dim=8)
  seen = []
  mapped = safetensors_files.Tensor.mapped

  def counted(tensor):
    seen.append(tensor.offset)
    return mapped(tensor)

  monkeypatch.setattr(safetensors_files.Tensor, "mapped", counted)

  def place(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = partition.specs({name: leaf}, mesh.shape, rules)[name]
    return NamedSharding(mesh, spec)

  _, read = pretrained.read(tmp_path / "model", place=place)
  shards = [
    len({str(shard.index) for shard in leaf.addressable_shards}) for leaf in jax.tree.leaves(read)
  ]
  assert max(shards) == 4 and len(seen) == sum(shards)


def test_on_eight_devices():
  done = targets.run_on_eight_devices(__file__)
  assert "2 passed" in done


@pytest.mark.parametrize(
  "fields, culprit",
  [
    ({"causal": False}, "causal"),
    ({"logit_softcap": 5.0}, "logit_softcap"),
    ({"position_range": 64}, "position_range"),
    ({"positions": "none"}, "positions"),
    ({"positions": "learned"}, "positions"),
    ({"embedding_scale": 2.0, "post_norms": True}, "post_norms, embedding_scale"),
    ({"qkv_bias": True, "mlp_bias": True}, "output_bias"),
  ],
)
def test_what_no_family_has_is_named(fields, culprit, tmp_path):
  config, params = fixed(**fields)
  with pytest.raises(ValueError, match=f"has no counterpart of {culprit} as configured, and"):
    pretrained.write(tmp_path / "model", config, params)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "family, fields, culprit",
  [
    ("llama", {"window": 4}, "llama has no counterpart of window as"),
    ("qwen2", {}, "qwen2 has no counterpart of qkv_bias as"),
    ("qwen3", {}, "qwen3 has no counterpart of qk_norm as"),
    ("gpt2", {**GPT2, "num_kv_heads": 2}, "gpt2 has no counterpart of num_kv_heads as"),
    ("gpt3", {}, "family='gpt3' is not one of"),
  ],
)
def test_what_the_family_that_is_asked_for_lacks_is_named(family, fields, culprit):
  with pytest.raises(ValueError, match=culprit):
    families.to_json(targets.tiny_config(**fields), family)


def test_a_family_is_found_whatever_the_spelling():
  config = targets.tiny_config
  assert families.to_json(config(qkv_bias=True, output_bias=True))[0] == "llama"
  assert families.to_json(config(window=None, window_pattern=(True, False)))[0] == "llama"
  assert families.to_json(config(window=4, window_pattern=(False,)))[0] == "llama"
  assert families.to_json(config(window=4, window_pattern=(True, True)))[0] == "mistral"
  assert families.to_json(config(attention_scale=8**-0.5, head_dim=8))[0] == "llama"
  trained = config(dropout=0.5, dtype="bfloat16", scan_layers=False, remat="full")
  assert families.to_json(trained)[0] == "llama"
  assert families.to_json(config(), "mistral")[0] == "mistral"


def test_params_of_another_configuration_are_named(tmp_path):
  config, params = fixed()
  for other, culprit in (
    (dataclasses.replace(config, qk_norm=True), "_norm/scale is None, and"),
    (dataclasses.replace(config, vocab_size=24), r"embedding is \(23, 32\), and \(24, 32\)"),
    (dataclasses.replace(config, num_layers=3), r"\(2, .* by the configuration"),
  ):
    with pytest.raises(ValueError, match=culprit):
      pretrained.write(tmp_path / "model", other, params)
  with pytest.raises(ValueError, match="dtype='float64'"):
    pretrained.write(tmp_path / "model", config, params, dtype="float64")
  whole = {**params, "embedding": params["embedding"].astype(jnp.int32)}
  with pytest.raises(ValueError, match="dtype='int32' is not one of"):
    pretrained.write(tmp_path / "model", config, whole)
  assert not list(tmp_path.iterdir())


def test_a_directory_appears_whole_or_not_at_all(tmp_path, monkeypatch):
  config, params = fixed()
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "a").touch()
  with pytest.raises(FileExistsError, match="full: there is something in it"):
    pretrained.write(tmp_path / "full", config, params)
  (tmp_path / "file").touch()
  with pytest.raises(FileExistsError, match="file: there is something in it"):
    pretrained.write(tmp_path / "file", config, params)
  (tmp_path / "empty").mkdir()
  pretrained.write(tmp_path / "empty", config, params)
  pretrained.write(tmp_path / "new" / "model", config, params)
  assert pretrained.read_config(tmp_path / "new" / "model") == pretrained.read_config(
    tmp_path / "empty"
  )

  def full_disk(*args):
    raise OSError("no space left")

  monkeypatch.setattr(pretrained, "_write_json", full_disk)  # after the tensors
  with pytest.raises(OSError, match="no space left"):
    pretrained.write(tmp_path / "failed", config, params)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full", "new"]


def test_token_ids_and_shards_that_cannot_be_are_named(tmp_path):
  config, params = fixed()
  with pytest.raises(ValueError, match=r"\['end'\], and may have"):
    pretrained.write(tmp_path / "model", config, params, token_ids={"end": 1})
  with pytest.raises(ValueError, match="max_shard_bytes=0"):
    pretrained.write(tmp_path / "model", config, params, max_shard_bytes=0)
