"""Rules of splitting, by hand, and what the compiler makes of constraints on eight devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import targets
from ancestral.models import partition, transformer

HEADS = {"vocab_size": 24, "num_layers": 1, "width": 32, "num_heads": 4, "num_kv_heads": 2}
EIGHTS = {"data": 2, "fsdp": 2, "tensor": 2}


def specs(params, head_dim=8, **sizes):
  return partition.specs(params, sizes, partition.rules(head_dim))


def test_specs_of_a_transformer():
  _, params = targets.tiny_target(**HEADS, positions="learned", tied_embeddings=False)
  columns = {"kernel": P(None, "fsdp", "tensor")}
  back = {"kernel": P(None, "tensor", "fsdp")}
  whole = {"scale": P()}
  expected = {
    "embedding": P("tensor", "fsdp"),
    "readout": P("fsdp", "tensor"),
    "positions": P(None, "fsdp"),
    "final_norm": whole,
    "layers": {
      "attention": {"query": columns, "key": columns, "value": columns, "output": back},
      "attention_norm": whole,
      "mlp": {"gate": columns, "up": columns, "down": back},
      "mlp_norm": whole,
    },
  }
  assert specs(params, **EIGHTS) == expected
  unstacked = specs(transformer.unstack(params), tensor=2)
  assert unstacked["layers"][0]["mlp"]["down"]["kernel"] == P("tensor", None)
  assert unstacked["layers"][0]["attention"]["key"]["kernel"] == P(None, "tensor")


def test_what_does_not_divide_stays_whole():
  """Four devices: two key/value heads of 8 channels would be cut, 23 tokens cannot be."""
  _, params = targets.tiny_target(**{**HEADS, "vocab_size": 23})
  found = specs(params, data=2, tensor=4)
  assert found["embedding"] == P()
  attention = found["layers"]["attention"]
  assert attention["key"]["kernel"] == attention["value"]["kernel"] == P()
  assert attention["query"]["kernel"] == P(None, None, "tensor")
  assert specs(params, 1, tensor=4)["layers"]["attention"]["key"]["kernel"] == P(
    None, None, "tensor"
  )
  for sizes in ({"data": 8}, {"data": 8, "tensor": 1}, {"fsdp": 5}):
    assert set(jax.tree.leaves(specs(params, **sizes), is_leaf=lambda x: x == P())) == {P()}
  assert specs(jnp.ones((4, 4)), tensor=2) == P()  # a table: no name, no rule


def test_a_rule_holds_wherever_the_path_ends_so():
  held = {
    "mu": {"layers": ({"mlp": {"up": {"kernel": jnp.ones((8, 16))}}},)},
    "count": jnp.ones(()),
  }
  assert specs(held, fsdp=2)["mu"]["layers"][0]["mlp"]["up"]["kernel"] == P("fsdp", None)
  assert specs(held, fsdp=2)["count"] == P()
  own = (partition.Rule("up/kernel$", P("data", "fsdp")), *partition.rules())
  assert partition.specs(held, EIGHTS, own)["mu"]["layers"][0]["mlp"]["up"]["kernel"] == P(
    "data", "fsdp"
  )


@pytest.mark.parametrize(
  "spec, shape, sizes, expected",
  [
    (P("fsdp"), (6,), {"fsdp": 2}, P("fsdp")),
    (P("fsdp"), (6,), {"fsdp": 4}, P()),
    (P("fsdp"), (6,), {"tensor": 2}, P()),
    (P("fsdp"), (2, 6), {"fsdp": 2}, P(None, "fsdp")),
    (P("fsdp", "tensor"), (6,), {"fsdp": 2}, P()),  # fewer dimensions than the spec has
    (P(("fsdp", "data")), (12,), {"fsdp": 2, "data": 3}, P(("fsdp", "data"))),
    (P(("fsdp", "data")), (6,), {"fsdp": 2, "data": 2}, P("fsdp")),  # 4 do not divide 6
    (P(("fsdp", "data")), (6,), {"fsdp": 4, "data": 2}, P("data")),
    (P(("data", "fsdp"), None), (8, 5), {"fsdp": 4, "data": 2}, P(("data", "fsdp"), None)),
  ],
)
def test_fitted(spec, shape, sizes, expected):
  assert partition.fitted(spec, shape, sizes) == expected


def test_an_optimiser_may_be_split_over_data_too():
  rule = partition.over_data((partition.Rule("x", P("fsdp", "tensor"), 4),))
  assert rule == (partition.Rule("x", P(("fsdp", "data"), "tensor"), 4),)


def test_constraints_are_nothing_without_a_mesh():
  x = jnp.ones((4, 4))
  assert partition.constrain(x, "data", None) is x and partition.ambient() == {}
  with jax.set_mesh(partition.make_mesh(devices=jax.devices()[:1])):
    assert partition.constrain(x, "data", None) is x


@pytest.mark.parametrize(
  "shape", [{"fsdp": 2}, {"data": 2}, {"tensor": 0}, {"data": 1, "tensor": 3}]
)
def test_a_mesh_that_the_devices_do_not_fill(shape):
  with pytest.raises(ValueError, match="does not fill the 1 devices: its product has to be that"):
    partition.make_mesh(**shape, devices=jax.devices()[:1])


def test_on_eight_devices():
  targets.run_on_eight_devices(__file__)


def eight_devices_make_a_mesh():
  assert dict(partition.make_mesh().shape) == {"data": 8, "fsdp": 1, "sequence": 1, "tensor": 1}
  mesh = partition.make_mesh(fsdp=2, tensor=2)
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}
  neighbours = [device.id for device in mesh.devices[0, 0, 0]]
  assert abs(neighbours[0] - neighbours[1]) == 1
  with pytest.raises(
    ValueError, match="A mesh of fsdp=3, sequence=1, tensor=1 does not fill the 8 dev"
  ):
    partition.make_mesh(fsdp=3)


def eight_devices_are_constrained():
  """By what divides only; and by no axis that `shard_map` maps over."""
  mesh = partition.make_mesh(fsdp=2, tensor=2)

  def split(x):
    return jax.jit(lambda x: partition.constrain(2 * x, partition.ROWS, "tensor"))(x).sharding.spec

  seen = []
  with jax.set_mesh(mesh):
    assert partition.ambient() == EIGHTS
    assert split(jnp.ones((8, 6))) == P(("data", "fsdp"), "tensor")
    assert split(jnp.ones((2, 6))) == P("data", "tensor")
    assert split(jnp.ones((3, 6))) == P(None, "tensor")

  def body(x):
    seen.append(partition.ambient())
    return partition.constrain(x, partition.ROWS, "tensor")

  over = jax.shard_map(
    body, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}
  )
  assert jnp.all(jax.jit(over)(jnp.ones((8, 6))) == 1)
  assert seen[0] == {"fsdp": 2, "tensor": 2}
