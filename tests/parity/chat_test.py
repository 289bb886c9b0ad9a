"""Tokenizers and chat templates against transformers: the same directory, the same ids."""

import json

import pytest

from ancestral.tasks import chat, tokenizer

pytestmark = pytest.mark.peers

# In the style of each family, from its documented format.
LLAMA = (
  "{% set loop_messages = messages %}{% for message in loop_messages %}"
  "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
  " + message['content'] | trim + '<|eot_id|>' %}"
  "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
  "{{ content }}{% endfor %}"
  "{% if add_generation_prompt %}"
  "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN = (
  "{%- if tools %}\n"
  "    {{- '<|im_start|>system\\n# Tools\\n' }}\n"
  "    {%- for tool in tools %}\n"
  "        {{- tool | tojson }}\n"
  "    {%- endfor %}\n"
  "    {{- '<|im_end|>\\n' }}\n"
  "{%- else %}\n"
  "    {%- if messages[0]['role'] == 'system' %}\n"
  "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
  "    {%- else %}\n"
  "        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}\n"
  "    {%- endif %}\n"
  "{%- endif %}\n"
  "{%- for message in messages %}\n"
  "    {%- if (message.role == 'user') or (message.role == 'system' and not loop.first)"
  " or (message.role == 'assistant' and not message.tool_calls) %}\n"
  "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
  "    {%- endif %}\n"
  "{%- endfor %}\n"
  "{%- if add_generation_prompt %}\n"
  "    {{- '<|im_start|>assistant\\n' }}\n"
  "{%- endif %}\n"
)
GEMMA = (
  "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
  "{{ raise_exception('System role not supported') }}{% endif %}"
  "{% for message in messages %}"
  "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
  "{% endif %}"
  "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
  "{% else %}{% set role = message['role'] %}{% endif %}"
  "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
CHATML = (
  "{% for message in messages %}\n"
  "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}\n"
  "{% endfor %}\n"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}\n"
)
MARKED = (
  "{% for message in messages %}{% if message.role == 'assistant' %}"
  "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
  "{% else %}{{ message | tojson(indent=2) }}{% continue %}{% endif %}{% endfor %}"
)
# Template, whether texts begin with the first of the special tokens, and these.
FAMILIES = {
  "llama": (
    LLAMA,
    True,
    ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
  ),
  "qwen": (QWEN, False, ("<|endoftext|>", "<|im_end|>", "<|im_start|>")),
  "gemma": (GEMMA, True, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<pad>")),
  "chatml": (CHATML, False, ("<|endoftext|>", "<|im_end|>", "<|im_start|>")),
  "marked": (MARKED, True, ("<s>", "</s>")),
}
USER = {"role": "user", "content": '  Who is <b>ünï</b> & "she"?\n'}
ANSWER = {"role": "assistant", "content": "The cat. "}
SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = {
  "question": [USER],
  "turns": [USER, ANSWER, USER],
  "system": [SYSTEM, USER],
  "answered": [USER, ANSWER],
}


@pytest.fixture(scope="module")
def loaded(peers, tmp_path_factory):
  """(family) -> its directory and transformers' tokenizer of it."""
  _, transformers, _ = peers
  library = pytest.importorskip("tokenizers")

  def make(family):
    template, begins, specials = FAMILIES[family]
    folder = tmp_path_factory.mktemp(family)
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
      vocab_size=320,
      special_tokens=list(specials),
      initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    )
    made.train_from_iterator(["the cat sat on the mat, user assistant system"] * 5, trainer)
    made.post_processor = (
      library.processors.TemplateProcessing(
        single=f"{specials[0]} $A", special_tokens=[(specials[0], 0)]
      )
      if begins
      else library.processors.ByteLevel(trim_offsets=False)
    )
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    config |= {"eos_token": specials[1], "bos_token": specials[0] if begins else None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder, transformers.AutoTokenizer.from_pretrained(folder)

  return {family: make(family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_have_their_ids(loaded, family):
  folder, theirs = loaded[family]
  ours = tokenizer.pretrained(folder)
  special = FAMILIES[family][2][1]
  for text in ("the cat", " sat, ünïcødé 漢字\n\n", f"the {special} mat", "x"):
    assert ours.opened(text) == theirs(text)["input_ids"]
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ours.encode(text)) == theirs.decode(
      ours.encode(text), skip_special_tokens=True
    )
  assert (ours.eos, ours.vocab_size) == (theirs.eos_token_id, len(theirs))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("asks", [True, False])
def test_conversations_are_the_same_text_and_ids(loaded, family, name, asks):
  folder, theirs = loaded[family]
  render, messages = chat.template(folder), CONVERSATIONS[name]
  if family == "gemma" and name == "system":
    with pytest.raises(ValueError, match="refuses messages of system, user: System role not"):
      render(messages)
    return
  text = render(messages, add_generation_prompt=asks)
  apply = theirs.apply_chat_template
  assert text == apply(messages, tokenize=False, add_generation_prompt=asks)
  ids = apply(messages, tokenize=True, add_generation_prompt=asks, return_dict=True)["input_ids"]
  assert tokenizer.pretrained(folder).encode(text) == ids


def test_roles_that_do_not_alternate_are_refused(loaded):
  folder, theirs = loaded["gemma"]
  with pytest.raises(Exception, match="must alternate"):
    theirs.apply_chat_template([USER, USER], tokenize=False)
  with pytest.raises(ValueError, match="refuses messages of user, user: Conversation roles must"):
    chat.template(folder)([USER, USER])


@pytest.mark.parametrize("family", ["llama", "qwen"])
@pytest.mark.parametrize("stated", [True, False])
def test_the_file_says_how_texts_begin_whatever_the_settings_say(
  loaded, peers, tmp_path, family, stated
):
  (tmp_path / "tokenizer.json").write_bytes((loaded[family][0] / "tokenizer.json").read_bytes())
  begin, end = FAMILIES[family][2][:2]
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": stated}
  config |= {"bos_token": begin, "eos_token": end}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  theirs = peers[1].AutoTokenizer.from_pretrained(tmp_path)
  assert tokenizer.pretrained(tmp_path).opened("the cat") == theirs("the cat")["input_ids"]


@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_our_tokenizers_load_there(peers, tmp_path, kind):
  text = "12+3=ünï 漢字\n"
  ours = tokenizer.bytes_level() if kind == "bytes" else tokenizer.characters(sorted(set(text)))
  for name, data in ours.files().items():
    (tmp_path / name).write_bytes(data)
  theirs = peers[1].AutoTokenizer.from_pretrained(tmp_path)
  assert theirs(text)["input_ids"] == ours.opened(text)
  assert theirs.decode(ours.opened(text), skip_special_tokens=True) == text
  specials = (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id)
  assert specials == (ours.pad, ours.bos, ours.eos) and len(theirs) == ours.vocab_size
