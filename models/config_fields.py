"""Fields of a `config.json`, each a pair of functions between their configuration and ours."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from . import rotary
from .transformer_config import TransformerConfig

Json = Mapping[str, Any]


class Field(NamedTuple):
  """A part of a configuration, both ways."""

  read: Callable[[Json], dict[str, Any]]  # their config -> fields of ours
  write: Callable[[TransformerConfig], dict[str, Any]]  # ours, resolved -> theirs


_REQUIRED = object()
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def _get(theirs: Json, name: str, default: Any) -> Any:
  value = theirs.get(name, default)
  if value is _REQUIRED or (value is None and default is _REQUIRED):
    raise ValueError(f"{name} is missing.")
  return value


def same(name: str, ours: str, default: Any = _REQUIRED) -> Field:
  """A field of another name; it has to be there unless their class has a default."""
  return Field(
    lambda theirs: {ours: _get(theirs, name, default)}, lambda c: {name: getattr(c, ours)}
  )


def only(name: str, *allowed: Any) -> Field:
  """A field that may have these values alone; the first is written."""

  def read(theirs):
    value = theirs.get(name, allowed[0])
    if value not in allowed:
      raise ValueError(f"{name}={value!r} is not supported, only {listed(allowed)}.")
    return {}

  return Field(read, lambda c: {name: allowed[0]})


def always(**ours: Any) -> Field:
  """What the family has whatever its config.json says."""
  return Field(lambda theirs: ours, lambda c: {})


def bias(name: str, *ours: str) -> Field:
  """One field of theirs, false if it is not there, for these of ours."""
  return Field(
    lambda theirs: dict.fromkeys(ours, bool(theirs.get(name, False))),
    lambda c: {name: getattr(c, ours[0])},
  )


def activation(name: str, known: Mapping[str, str], default: str) -> Field:
  """The activation by their names of ours; of two names for one, the first is written."""

  def read(theirs):
    value = theirs.get(name) or default
    if value not in known:
      raise ValueError(f"{name}={value!r} is not supported, only {listed(known)}.")
    return {"activation": known[value]}

  inverse = {ours: theirs for theirs, ours in reversed(known.items())}
  return Field(read, lambda c: {name: inverse[c.activation]})


def listed(values: Iterable[Any]) -> str:
  """What may be, in words."""
  return " or ".join(repr(value) for value in values)


def _read_rotary(theirs: Json) -> dict[str, Any]:
  given = dict(theirs.get("rope_scaling") or theirs.get("rope_parameters") or {})
  kind = given.pop("rope_type", given.pop("type", "default"))
  base = given.pop("rope_theta", theirs.get("rope_theta", 10_000.0))
  if given.pop("partial_rotary_factor", theirs.get("partial_rotary_factor", 1.0)) != 1.0:
    raise ValueError("partial_rotary_factor is not supported, only 1.0.")
  given = {name: value for name, value in given.items() if value is not None}
  if kind == "default":
    if given:  # such as parameters by kind of layer
      raise ValueError(f"rope_type='default' has no fields {sorted(given)}.")
    return {"rotary_base": base}
  if kind not in rotary.KINDS:
    known = listed(("default", *rotary.KINDS))
    raise ValueError(f"rope_type={kind!r} is not supported, only {known}.")
  length = "original_max_position_embeddings"
  if kind != "linear":
    given[length] = theirs.get(length, given.get(length, theirs["max_position_embeddings"]))
  return {"rotary_base": base, "rotary_scaling": rotary.parse({"rope_type": kind, **given})}


def _write_rotary(c: TransformerConfig) -> dict[str, Any]:
  # transformers 5 reads rope_parameters, and what is older reads rope_theta and rope_scaling.
  scaled = None if c.rotary_scaling is None else rotary.fields(c.rotary_scaling)
  parameters = {"rope_theta": c.rotary_base, **(scaled or {"rope_type": "default"})}
  return {"rope_theta": c.rotary_base, "rope_scaling": scaled, "rope_parameters": parameters}


def _kind(local: bool) -> str:
  return "sliding_attention" if local else "full_attention"


def shortest_pattern(local: list[bool]) -> tuple[bool, ...]:
  """The shortest pattern that, repeated, begins like this."""
  fits = lambda n: all(one == local[i % n] for i, one in enumerate(local))
  return tuple(local[: next(n for n in range(1, len(local) + 1) if fits(n))])


def _read_windows(theirs: Json, window: int | None, local: Callable[[int], bool]) -> dict:
  """The window and its layers; `local` says which layers have it where `layer_types` does not."""
  num_layers, kinds = theirs["num_hidden_layers"], theirs.get("layer_types")
  if kinds is not None and (
    len(kinds) != num_layers or not set(kinds) <= {"sliding_attention", "full_attention"}
  ):
    raise ValueError(
      f"layer_types={kinds!r} are not supported, only {num_layers} of 'sliding_attention' or "
      "'full_attention'."
    )
  chosen = [local(i) if kinds is None else kinds[i] == _kind(True) for i in range(num_layers)]
  if window is None or not any(chosen):
    return {}
  return {"window": window, "window_pattern": shortest_pattern(chosen)}


def _read_qwen_windows(theirs: Json) -> dict[str, Any]:
  window = theirs.get("sliding_window", 4096) if theirs.get("use_sliding_window") else None
  first = theirs.get("max_window_layers", 28)
  return _read_windows(theirs, window, lambda i: i >= first)


def _write_qwen_windows(c: TransformerConfig) -> dict[str, Any]:
  local = c.local_layers
  return {
    "use_sliding_window": any(local),
    "sliding_window": c.window,
    "max_window_layers": local.index(True) if any(local) else c.num_layers,
    "layer_types": [_kind(one) for one in local],
  }


def _write_alternate_windows(c: TransformerConfig) -> dict[str, Any]:
  return {"sliding_window": c.window, "layer_types": [_kind(one) for one in c.local_layers]}


def root(name: str) -> Field:
  """What queries are divided by the root of; a whole number."""
  return Field(
    lambda theirs: {"attention_scale": _get(theirs, name, 256) ** -0.5},
    lambda c: {name: round(c.attention_scale**-2)},
  )


SCALED_SCORES = Field(
  lambda theirs: {} if theirs.get("scale_attn_weights", True) else {"attention_scale": 1.0},
  lambda c: {"scale_attn_weights": c.attention_scale != 1.0},
)
ROTARY = Field(_read_rotary, _write_rotary)
UNQUANTISED = only("quantization_config", None)._replace(write=lambda c: {})
MISTRAL_WINDOW = Field(
  lambda theirs: _read_windows(theirs, theirs.get("sliding_window", 4096), lambda i: True),
  lambda c: {"sliding_window": c.window},
)
GEMMA_WINDOWS = Field(
  lambda theirs: _read_windows(theirs, theirs.get("sliding_window", 4096), lambda i: i % 2 == 0),
  _write_alternate_windows,
)
QWEN_WINDOWS = Field(_read_qwen_windows, _write_qwen_windows)
GPT2_WIDTH = Field(
  lambda theirs: {"mlp_width": theirs.get("n_inner") or 4 * theirs["n_embd"]},
  lambda c: {"n_inner": c.mlp_width},
)
GEMMA_EMBEDDING = Field(
  lambda theirs: {"embedding_scale": theirs["hidden_size"] ** 0.5}, lambda c: {}
)
