"""A pretrained directory, as transformers saves it, in place of a run: model and tokenizer."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
from absl import flags

from ..models import base as models
from ..models import families, partition, safetensors_files, transformer
from ..models import pretrained as directories
from ..tasks import chat
from ..tasks import tokenizer as tokenizers
from ..training import lora, peft_layout
from . import fields

DIRECTORY = flags.DEFINE_string(
  "pretrained",
  None,
  "Directory of a model to sample from: config.json, safetensors, tokenizer.json.",
)
DTYPE = flags.DEFINE_enum(
  "dtype", None, ["float32", "bfloat16"], "Of the weights; as they are stored if unset."
)
ADAPTERS = flags.DEFINE_string("adapters", None, "Directory of PEFT's, merged into --pretrained.")
CHAT = flags.DEFINE_bool(
  "chat", False, "A prompt is a user's message, in the chat template of --pretrained."
)
SYSTEM = flags.DEFINE_string("system", None, "The system's message before each prompt of --chat.")
FLAGS = (DIRECTORY, DTYPE, ADAPTERS, CHAT, SYSTEM)

_NEW_TOKENS, _ROWS = 256, 16  # where neither a flag nor a file says


class Pretrained(NamedTuple):
  """What `texts` reads of an experiment."""

  config: fields.Config
  task: None
  tokenizer: tokenizers.Tokenizer
  model_config: transformer.TransformerConfig
  model: models.LanguageModel


def check_flags() -> None:
  """Raises FileNotFoundError, ValueError where --pretrained and what goes with it are not right."""
  if not pathlib.Path(DIRECTORY.value).is_dir():
    raise FileNotFoundError(f"--pretrained={DIRECTORY.value}: there is no such directory.")
  if SYSTEM.value is not None and not CHAT.value:
    raise ValueError("--system is a message of a conversation: give --chat.")


def template() -> chat.Template | None:
  """The chat template of --pretrained, where --chat asks for it.

  Raises:
    ValueError, ImportError: it has none.
  """
  return chat.template(DIRECTORY.value) if CHAT.value else None


def restore(
  directory: str,
  mesh: jax.sharding.Mesh,
  *,
  dtype: str | None = None,
  adapters: str | None = None,
) -> tuple[Pretrained, models.Params, dict[str, Any]]:
  """The model, its params for decoding, and where they are from.

  Args:
    directory: of the model.
    mesh: where params go, each device reading its part.
    dtype: of params and computation; None keeps the files'.
    adapters: a directory of PEFT's to be merged in.

  Raises:
    FileNotFoundError, ValueError, ImportError: in one line, before the params are read, what the
      directory has not, or what is not supported.
  """
  tokenizer = tokenizers.pretrained(directory)
  config = directories.read_config(directory, dtype=dtype)
  change = _adapters(directory, adapters, config) if adapters else None
  rules = partition.rules(config.resolved().head_dim)
  place = partition.placing(mesh, rules)
  config, params = directories.read(directory, place=place, dtype=dtype)
  if change is not None:
    merge = jax.jit(
      functools.partial(lora.merge, scale=change.scale),
      out_shardings=partition.shardings(params, mesh, rules),
      donate_argnums=0,
    )
    params = merge(params, change.adapters)
  evaluation, model = _evaluation(directory, config), transformer.transformer(config)
  made = Pretrained(evaluation, None, tokenizer, config, model)
  return made, params, {"pretrained": directory, "dtype": dtype, "adapters": adapters}


def _adapters(directory, adapters, config) -> peft_layout.Adapted:
  """The adapters, named as the model's own family has them."""
  family, _ = families.from_json(
    safetensors_files.read_json(pathlib.Path(directory, "config.json"))
  )
  return peft_layout.read(adapters, config, family=family)


def _evaluation(directory, config) -> fields.Config:
  """How much is drawn: the tokens that `generation_config.json` says, or else a usual number."""
  path = pathlib.Path(directory, "generation_config.json")
  given = safetensors_files.read_json(path).get("max_new_tokens") if path.is_file() else None
  new = given if type(given) is int and given > 0 else _NEW_TOKENS
  most = max(config.max_length - 1, 1)
  return fields.Config(
    {"evaluation": {"max_new_tokens": min(new, most), "batch_size": _ROWS}}
  ).lock()
