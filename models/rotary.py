"""Rotary frequencies stretched to contexts longer than those that a model was trained on.

Each kind is what `config.json` calls a `rope_type`, with the fields that it has there. A frequency
is what a plane of channels turns by per position, base^(-2 i / C).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
  """Positions divided by `factor` (Chen et al. 2023, arXiv 2306.15595)."""

  factor: float
  score_factor = 1.0  # what attention scores are multiplied by

  def frequencies(self, channels: int, base: float) -> np.ndarray:
    """Frequencies [C / 2], float64."""
    return plain(channels, base) / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3:
  """Planes of long wavelength turn slower by `factor`, of short ones as before.

  A wavelength is short below original / high_freq_factor, long above original / low_freq_factor,
  and in between the frequency is a mean of both, linear in original / wavelength.

  Reference: Grattafiori et al. 2024, arXiv 2407.21783, and the reference code of Llama 3.1.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int
  score_factor = 1.0

  def frequencies(self, channels: int, base: float) -> np.ndarray:
    """Frequencies [C / 2], float64."""
    before = plain(channels, base)
    turns = self.original_max_position_embeddings * before / (2 * math.pi)
    span = self.high_freq_factor - self.low_freq_factor
    kept = np.clip((turns - self.low_freq_factor) / span, 0, 1)
    return before * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
  """As `Llama3`, the mean being linear in the number of the plane; and scores are larger.

  Planes that turn more than `beta_fast` times in the original context stay as they are, those
  that turn less than `beta_slow` times turn slower by `factor`. Queries and keys are longer by
  m = 0.1 ln(factor) + 1, unless `attention_factor`, or `mscale` and `mscale_all_dim`, say another.

  Reference: Peng et al. 2023, arXiv 2309.00071, sections 3.2 and 3.4.
  """

  factor: float
  original_max_position_embeddings: int
  beta_fast: float = 32
  beta_slow: float = 1
  attention_factor: float | None = None
  mscale: float | None = None
  mscale_all_dim: float | None = None
  truncate: bool = True  # the planes between which frequencies are mixed to whole numbers

  @property
  def score_factor(self) -> float:
    """m^2: of queries and of keys."""
    grown = lambda scale: 0.1 * scale * math.log(self.factor) + 1 if self.factor > 1 else 1.0
    length = grown(1)
    if self.attention_factor is not None:
      length = self.attention_factor
    elif self.mscale and self.mscale_all_dim:
      length = grown(self.mscale) / grown(self.mscale_all_dim)
    return length**2

  def frequencies(self, channels: int, base: float) -> np.ndarray:
    """Frequencies [C / 2], float64."""
    before = plain(channels, base)
    context = self.original_max_position_embeddings / (2 * math.pi)
    plane = lambda turns: channels * math.log(context / turns) / (2 * math.log(base))
    first, last = plane(self.beta_fast), plane(self.beta_slow)
    if self.truncate:
      first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, channels - 1)
    last += 0.001 if first == last else 0
    slowed = np.clip((np.arange(channels // 2) - first) / (last - first), 0, 1)
    return before * (1 - slowed + slowed / self.factor)


Scaling = Linear | Llama3 | Yarn
KINDS = {"linear": Linear, "llama3": Llama3, "yarn": Yarn}


def plain(channels: int, base: float) -> np.ndarray:
  """Frequencies [C / 2] of the planes of C channels without scaling, float64."""
  return float(base) ** (-np.arange(0, channels, 2) / channels)


def parse(fields: Mapping[str, Any]) -> Scaling:
  """The scaling of a mapping of `rope_type` and its fields, as in `config.json`.

  Raises:
    ValueError: another type, or fields that the type has not, or lacks.
  """
  given = dict(fields)
  name = given.pop("rope_type", None)
  if name not in KINDS:
    raise ValueError(f"rope_type={name!r} is not one of {tuple(KINDS)}.")
  known = dataclasses.fields(KINDS[name])
  needed = {field.name for field in known if field.default is dataclasses.MISSING}
  wrong = sorted(set(given) - {field.name for field in known})
  missing = sorted(needed - set(given))
  if wrong or missing:
    raise ValueError(f"rope_type={name!r} has no fields {wrong} and needs {sorted(needed)}.")
  for field in sorted(needed):
    if not isinstance(given[field], int | float) or given[field] <= 0:
      raise ValueError(f"rope_type={name!r}: {field}={given[field]!r} is not a number above 0.")
  return KINDS[name](**given)


def fields(scaling: Scaling) -> dict[str, Any]:
  """What `parse` reads; fields of None are left out."""
  (name,) = [name for name, kind in KINDS.items() if isinstance(scaling, kind)]
  given = dataclasses.asdict(scaling).items()
  return {"rope_type": name, **{field: value for field, value in given if value is not None}}
