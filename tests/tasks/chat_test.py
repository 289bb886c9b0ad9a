"""Chat templates: how they are found, what they are given, and what they refuse."""

import datetime
import json
import sys

import pytest

from ancestral.tasks import chat

MARKED = (
  "{{ bos_token }}{% for message in messages %}\n"
  "  {% if message.role not in ('system', 'user', 'assistant') %}\n"
  "    {{ raise_exception('Unknown role ' + message.role) }}\n"
  "  {% endif %}\n"
  "<{{ message.role }}>{{ message.content | trim }}\n"
  "{% endfor %}\n"
  "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = {"role": "user", "content": " Hi. "}
jinja2 = pytest.importorskip("jinja2")


def directory(folder, template, **fields):
  config = {"chat_template": template, "bos_token": {"content": "[B]"}, **fields}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


def test_a_template_writes_what_it_says_blocks_leave_no_lines(tmp_path):
  render = chat.template(directory(tmp_path, MARKED))
  answer = {"role": "assistant", "content": "Yes?", "tool_calls": None}
  assert render([USER, answer, USER]) == "[B]<user>Hi.\n<assistant>Yes?\n<user>Hi.\n<assistant>"
  assert render([USER], add_generation_prompt=False) == "[B]<user>Hi.\n"


def test_a_file_comes_before_the_field_and_default_before_other_names(tmp_path):
  named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
  assert chat.template(directory(tmp_path, named))([USER]) == "plain"
  (tmp_path / "chat_template.jinja").write_text("file {{ eos_token }}.")
  assert chat.template(directory(tmp_path, named, eos_token="</s>"))([USER]) == "file </s>."
  assert chat.template(directory(tmp_path, None))([USER]) == "file ."


def test_what_transformers_gives_to_templates_is_there(tmp_path):
  source = (
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
    "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
    "{{ strftime_now('%Y') }}{{ tools is none }}{{ documents is none }}{{ missing_token }}"
  )
  render = chat.template(directory(tmp_path, source))
  year = datetime.datetime.now().year
  text = {"role": "user", "content": "<é & \"'>"}
  shown = '{"role": "user", "content": "<é & \\"\'>"}'
  assert render([text, USER]) == f"{shown}{year}TrueTrue"


@pytest.mark.parametrize(
  "template, messages, words",
  [
    (None, [USER], "has no chat template, in tokenizer_config.json or chat_template.jinja"),
    ([{"name": "rag", "template": ""}], [USER], "named rag, and none named default"),
    ("{% if %}", [USER], "the chat template is not Jinja: Expected an expression"),
    (MARKED, [{"role": "tool", "content": ""}], "refuses messages of tool: Unknown role tool"),
    ("{{ messages[0].content + 1 }}", [USER], "refuses messages of user: can only concatenate"),
    ("{{ messages.append(1) }}", [USER], "refuses messages of user: access to attribute 'append'"),
    ("{{ messages[0]['missing'].more }}", [USER], "has no attribute 'missing'"),
    (MARKED, [], "at least one"),
    (MARKED, "Hi", "at least one"),
    (MARKED, ["Hi"], "an object of role and content, not 'Hi'"),
    (MARKED, [{"content": "Hi"}], "an object of role and content"),
  ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, template, messages, words):
  with pytest.raises(ValueError) as error:
    chat.template(directory(tmp_path, template))(messages)
  assert words in str(error.value) and "\n" not in str(error.value)


def test_without_jinja_the_extra_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "jinja2", None)
  with pytest.raises(ImportError, match=r"pip install 'ancestral\[pretrained\]'"):
    chat.template(directory(tmp_path, MARKED))
