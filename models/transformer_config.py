"""The shape of a transformer, checked when it is written down."""

import dataclasses
import functools
from collections.abc import Mapping

import jax

from . import layers, rotary


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
  """Shape of a transformer; a field of None takes the value its comment says.

  Raises:
    ValueError: fields that do not fit together, at construction.
  """

  vocab_size: int
  max_length: int  # the longest sequence; learned positions and randomised spacing depend on it
  num_layers: int
  width: int
  num_heads: int
  num_kv_heads: int | None = None  # num_heads
  head_dim: int | None = None  # width / num_heads
  mlp_width: int | None = None  # 8/3 of the width, rounded up to a multiple of 32
  causal: bool = True
  window: int | None = None  # no sliding window
  window_pattern: tuple[bool, ...] = (True,)  # which layers have it, repeated over the layers
  positions: str = "rotary"  # or "learned", "none"
  rotary_base: float = 10_000.0
  rotary_scaling: rotary.Scaling | None = None  # none; or a mapping, `rotary.parse`
  position_range: int | None = None  # not randomised; otherwise of the positions drawn in training
  use_bias: bool = False
  qkv_bias: bool | None = None  # of queries, keys and values: use_bias
  output_bias: bool | None = None  # of attention's output: use_bias
  mlp_bias: bool | None = None  # use_bias
  qk_norm: bool = False
  attention_scale: float | None = None  # of the scores: head_dim^-0.5
  attention_softcap: float | None = None  # no cap on the scores
  attention: str = "exact"  # or the library's, "xla", "cudnn": `layers.library_attention`
  gated_mlp: bool = True
  activation: str = "silu"  # or "gelu", "gelu_tanh"
  norm: str = "rms"  # or "layer", with a bias
  norm_epsilon: float = 1e-6
  zero_centred_norms: bool = False  # the norms' parameters are their scales less 1
  post_norms: bool = False  # the branches' outputs are normalised too
  embedding_scale: float = 1.0
  tied_embeddings: bool = True
  logit_softcap: float | None = None  # no cap
  dropout: float = 0.0
  dtype: str = "float32"  # of the computation; params, softmax and logits are float32
  scan_layers: bool = True  # init stacks the layers' params: compile time constant in depth
  remat: str = "none"  # or "full", "products": what of a layer is made again backward, see REMAT

  def __post_init__(self):
    if isinstance(self.rotary_scaling, Mapping):
      object.__setattr__(self, "rotary_scaling", rotary.parse(self.rotary_scaling))
    object.__setattr__(self, "window_pattern", tuple(self.window_pattern))
    width, heads = self.width, self.num_heads
    divides = self.head_dim is not None or width % max(heads, 1) == 0
    _require(divides, f"width={width} is not a multiple of num_heads={heads}: give head_dim")
    c = self.resolved()
    kv_heads, span = c.num_kv_heads, c.position_range
    for name in ("vocab_size", "max_length", "num_layers", "width", "num_heads", *_DERIVED):
      _require(getattr(c, name) >= 1, f"{name}={getattr(c, name)} is not at least 1")
    _require(
      heads % kv_heads == 0, f"num_heads={heads} is not a multiple of num_kv_heads={kv_heads}"
    )
    kinds = ("rotary", "learned", "none")
    _require(c.positions in kinds, f"positions={c.positions!r} is not one of {kinds}")
    even = c.positions != "rotary" or c.head_dim % 2 == 0
    _require(even, f"head_dim={c.head_dim} is odd: rotary positions turn pairs of channels")
    wide = span is None or span >= c.max_length
    _require(wide, f"position_range={span} is less than max_length={c.max_length}")
    randomised = span is not None and c.positions == "none"
    _require(not randomised, "positions='none' leaves position_range nothing to randomise")
    _require(c.remat in REMAT, f"remat={c.remat!r} is not one of {tuple(REMAT)}")
    _require(c.window is None or c.window >= 1, f"window={c.window} is not at least 1")
    _require(0 <= c.dropout < 1, f"dropout={c.dropout} is not in [0, 1)")
    for name in ("logit_softcap", "attention_softcap", "attention_scale", "embedding_scale"):
      value = getattr(c, name)
      _require(value is None or value > 0, f"{name}={value} is not above 0")
    _check_kinds(c)

  def resolved(self) -> "TransformerConfig":
    """The same with what is None and has a value of its own filled in."""
    rules = {**_DERIVED, **_IMPLIED}
    filled = {name: rule(self) for name, rule in rules.items() if getattr(self, name) is None}
    return dataclasses.replace(self, **filled) if filled else self

  @property
  def local_layers(self) -> tuple[bool, ...]:
    """Which of the layers have the window, [num_layers]."""
    pattern = self.window_pattern if self.window is not None else (False,)
    return tuple(pattern[i % len(pattern)] for i in range(self.num_layers))


# What a layer keeps for its backward pass; the rest is made again from what it was given (Chen et
# al. 2016, arXiv 1604.06174). "full" keeps nothing, and costs a forward pass; "products" keeps what
# its matrices give, and makes attention again, whose weights are the largest arrays.
REMAT = {
  "none": lambda layer: layer,
  "full": jax.checkpoint,
  "products": functools.partial(
    jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  ),
}

_DERIVED = {
  "num_kv_heads": lambda config: config.num_heads,
  "head_dim": lambda config: config.width // max(config.num_heads, 1),
  "mlp_width": lambda config: -(-8 * config.width // 96) * 32,
}
_IMPLIED = {
  "qkv_bias": lambda config: config.use_bias,
  "output_bias": lambda config: config.use_bias,
  "mlp_bias": lambda config: config.use_bias,
  "attention_scale": lambda config: (config.head_dim or _DERIVED["head_dim"](config)) ** -0.5,
}


def _check_kinds(c: TransformerConfig) -> None:
  kinds = {
    "activation": tuple(layers.ACTIVATIONS),
    "norm": ("rms", "layer"),
    "attention": ("exact", "xla", "cudnn"),
  }
  for name, known in kinds.items():
    _require(getattr(c, name) in known, f"{name}={getattr(c, name)!r} is not one of {known}")
  layer_norm = c.norm == "layer" and c.zero_centred_norms
  _require(not layer_norm, "zero_centred_norms is of norm='rms'")
  capped = c.attention != "exact" and c.attention_softcap is not None
  _require(not capped, f"attention={c.attention!r} has no attention_softcap")
  stretched = c.rotary_scaling is not None and c.positions != "rotary"
  _require(not stretched, f"positions={c.positions!r} leave rotary_scaling nothing to scale")
  _require(
    len(c.window_pattern) > 0, "window_pattern=() says of no layer whether it has the window"
  )


def _require(holds: bool, rule: str) -> None:
  if not holds:
    raise ValueError(f"TransformerConfig: {rule}.")
