"""Conversations as texts: the template that a model was trained with, from its own directory.

A template is Jinja, read as transformers' `apply_chat_template` reads it: sandboxed, with
`raise_exception`, `strftime_now` and its `tojson`. It writes the beginning-of-sequence token itself
where the model has one, so its text is encoded without another.
"""

import datetime
import importlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import tokenizer_files

Message = Mapping[str, Any]  # "role" and "content", and what else the template reads
Template = Callable[..., str]  # (messages, *, add_generation_prompt=True) -> text


def template(directory: str | pathlib.Path) -> Template:
  """The chat template of a model's directory: a function of messages.

  It is `chat_template.jinja`, or else "chat_template" of `tokenizer_config.json`: a text, or a list
  of named ones, of which "default" is taken. With `add_generation_prompt`, which is the default,
  the text ends where an answer begins.

  Raises:
    ImportError: jinja2 is missing.
    ValueError: there is no template, or it does not parse; from the function, messages are not of
      the form, or the template refuses them.
  """
  directory = pathlib.Path(directory)
  told = tokenizer_files.settings(directory)
  environment = _environment()
  tokens = {name: _content(value) for name, value in told.items() if name.endswith("_token")}
  tokens = {name: value for name, value in tokens.items() if isinstance(value, str)}
  jinja = importlib.import_module("jinja2")
  try:
    compiled = environment.from_string(_source(directory, told))
  except jinja.TemplateError as error:
    raise ValueError(f"{directory}: the chat template is not Jinja: {_line(error)}") from None

  def render(messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
    _check(messages)
    given = [{name: x for name, x in one.items() if x is not None} for one in messages]
    try:
      return compiled.render(
        messages=given,
        tools=None,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **tokens,
      )
    except (jinja.TemplateError, TypeError, ValueError, LookupError) as error:
      roles = ", ".join(one["role"] for one in messages)
      raise ValueError(
        f"The chat template of {directory} refuses messages of {roles}: {_line(error)}"
      ) from None

  return render


def _line(error: Exception) -> str:
  return " ".join(str(error).split())


def _content(token: Any) -> Any:
  return token.get("content") if isinstance(token, Mapping) else token


def _source(directory: pathlib.Path, told: Mapping[str, Any]) -> str:
  path = directory / "chat_template.jinja"
  if path.is_file():
    return path.read_text("utf-8")
  found = told.get("chat_template")
  if isinstance(found, list):
    named = {one["name"]: one["template"] for one in found}
    if "default" not in named:
      raise ValueError(
        f"{directory} has chat templates named {', '.join(named)}, and none named default."
      )
    found = named["default"]
  if not isinstance(found, str):
    raise ValueError(
      f"{directory} has no chat template, in tokenizer_config.json or chat_template.jinja: give "
      "whole prompts, or a chat model's directory."
    )
  return found


def _check(messages: Sequence[Message]) -> None:
  if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
    raise ValueError(f"messages are a list of at least one, not {messages!r}.")
  for one in messages:
    if not isinstance(one, Mapping) or not isinstance(one.get("role"), str):
      raise ValueError(f"A message is an object of role and content, not {one!r}.")


def _environment() -> Any:
  """Of Jinja, as transformers sets it up."""
  try:
    jinja = importlib.import_module("jinja2")
  except ImportError:
    raise ImportError("A chat template needs jinja2: pip install 'ancestral[pretrained]'") from None
  sandbox = importlib.import_module("jinja2.sandbox")
  ext, nodes = importlib.import_module("jinja2.ext"), importlib.import_module("jinja2.nodes")

  class Generation(ext.Extension):
    """{% generation %} marks what an assistant wrote; as a text it is its body."""

    tags = frozenset({"generation"})

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      return nodes.Scope(body, lineno=line)

  def raise_exception(message):
    raise jinja.TemplateError(message)

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
  )
  environment.filters["tojson"] = _to_json
  environment.globals["raise_exception"] = raise_exception
  environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
  return environment


def _to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  # Jinja's own escapes what HTML would.
  return json.dumps(
    x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )
