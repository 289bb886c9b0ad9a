"""How tokens are drawn, from the command line: the settings of `sampling.presets` as flags.

  --preset=transformers --temperature=0.7 --top_p=0.9 --repetition_penalty=1.1
  --preset=vllm --bad_words='["foo", "bar baz"]'

The preset says in which order the settings apply and what they mean. Values are JSON; where tokens
are asked for, a text stands for its tokens.
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from ..sampling import logits, presets
from ..tasks import tokenizer as tokenizers

PRESETS = {
  "transformers": presets.transformers,
  "vllm": presets.vllm,
  "llamacpp": presets.llamacpp,
}


def _parameters(preset: str) -> Mapping[str, inspect.Parameter]:
  return inspect.signature(PRESETS[preset]).parameters


_STOP = ("eos_token_id", "stop_token_ids")  # the tokenizer's, unless given
_PRESET = flags.DEFINE_enum(
  "preset", "transformers", list(PRESETS), "Whose names, order and meaning the settings have."
)
_SETTINGS = {
  name: flags.DEFINE_string(
    name, None, f"Setting of {', '.join(p for p in PRESETS if name in _parameters(p))}, as JSON."
  )
  for name in dict.fromkeys(name for preset in PRESETS for name in _parameters(preset))
}
FLAGS = (_PRESET, *_SETTINGS.values())


class Decoding(NamedTuple):
  """The arguments of `serve.server` that say how to draw."""

  transform: Callable[[Mapping[str, Any]], logits.LogitsTransform]
  settings: dict[str, float]  # the numbers: every request may have its own
  fixed: dict[str, Any]  # the rest, the preset's name included, as JSON has it


def from_flags(tokenizer: tokenizers.Tokenizer) -> Decoding:
  """What the flags ask for.

  Raises:
    ValueError: a value is not JSON, or the preset has no such setting.
  """
  preset = _PRESET.value
  parameters = _parameters(preset)
  given = {name: flag.value for name, flag in _SETTINGS.items() if flag.value is not None}
  for name in given:
    if name not in parameters:
      raise ValueError(
        f"--{name} is no setting of --preset={preset}, which has {', '.join(parameters)}."
      )
  values = {name: _parse(name, text, parameters[name], tokenizer) for name, text in given.items()}
  numbers = {name: values[name] for name in values if _is_number(parameters[name])}
  if not numbers.keys() & {"temperature", "temp"}:
    numbers["temp" if "temp" in parameters else "temperature"] = 1.0
  fixed = {name: value for name, value in values.items() if name not in numbers}
  fixed |= {name: tokenizer.stops for name in _STOP if name in parameters and name not in fixed}
  described = json.loads(json.dumps({"preset": preset, **fixed}))
  return Decoding(lambda settings: PRESETS[preset](**fixed, **settings), numbers, described)


def _is_number(parameter) -> bool:
  return parameter.annotation in (presets.Number, presets.Number | None)


def _parse(name, text, parameter, tokenizer):
  """The value of a setting: a number of the parameter's kind, or what JSON and texts make."""
  try:
    value = json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(f"--{name}={text} is not JSON: {error}.") from None
  if _is_number(parameter):
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise ValueError(f"--{name}={text} is not a number.")
    return float(value)
  if parameter.annotation is int and type(value) is not int:
    raise ValueError(f"--{name}={text} is not a whole number.")
  if parameter.annotation in (Sequence[int], Sequence[int] | None):
    entries = value if isinstance(value, list) else [value]
    if not all(type(entry) in (int, str) for entry in entries):
      raise ValueError(f"--{name}={text} is no list of tokens or texts.")
    coded = [tokenizer.encode(entry) if isinstance(entry, str) else [entry] for entry in entries]
    return [token for tokens in coded for token in tokens]
  if isinstance(value, dict):
    try:
      return {int(token): float(bias) for token, bias in value.items()}
    except (TypeError, ValueError):
      raise ValueError(f"--{name}={text} is no object of tokens and numbers.") from None
  if isinstance(value, list):
    return [tokenizer.encode(entry) if isinstance(entry, str) else entry for entry in value]
  return value
