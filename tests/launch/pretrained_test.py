"""Samples from a directory of transformers': prompts, conversations, adapters, 8 bits, meshes."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.launch import export, sample
from ancestral.launch import pretrained as launch
from ancestral.models import partition, pretrained, quantised, transformer
from ancestral.tasks import tokenizer as tokenizers
from ancestral.training import lora, peft_layout

CONFIG = transformer.TransformerConfig(
  vocab_size=320,  # a padded embedding: the tokenizer has fewer
  max_length=512,
  num_layers=2,
  width=32,
  num_heads=4,
  num_kv_heads=2,
  mlp_width=64,
  qkv_bias=True,
  tied_embeddings=False,
)
TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPT = "the cat sat"


def write_tokenizer(folder):
  library = pytest.importorskip("tokenizers")
  made = library.Tokenizer(library.models.BPE())
  made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = library.decoders.ByteLevel()
  trainer = library.trainers.BpeTrainer(
    vocab_size=290,
    special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator(["the cat sat on the mat and that is that"] * 5, trainer)
  made.save(str(folder / "tokenizer.json"))
  settings = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
  settings["tokenizer_class"] = "PreTrainedTokenizerFast"
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
  """A model as transformers saves it, which begins texts with themselves and has two ends."""
  folder = tmp_path_factory.mktemp("pretrained") / "model"
  params = jax.jit(transformer.transformer(CONFIG).init)(
    jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  )
  params["readout"] = 3 * params["readout"]  # laws that are not flat
  ids = {"bos_token_id": 0, "eos_token_id": [2, 0], "pad_token_id": 0}
  pretrained.write(folder, CONFIG, params, family="qwen2", token_ids=ids)
  write_tokenizer(folder)
  return folder


@pytest.fixture
def draw(command, folder, tmp_path):
  """(*flags) -> the records written."""

  def run(*arguments, model=folder):
    path = tmp_path / "samples.jsonl"
    path.unlink(missing_ok=True)
    outcome = command(sample, f"--pretrained={model}", *arguments, f"--output={path}")
    assert outcome.status == 0, outcome.err
    records = map(json.loads, path.read_text().splitlines())
    return sorted(records, key=lambda record: record["index"])

  return run


@jax.jit
def log_probs(params, tokens):
  """[L, V] of tokens [L], by a whole pass without a cache."""
  model = transformer.transformer(CONFIG)
  hidden, _ = model.trunk(params, model.embed(params, tokens[None]))
  return jax.nn.log_softmax(model.readout(params, hidden)[0])


def likeliest(params, ids, count):
  """Greedy tokens and their log-probabilities."""
  ids, drawn, scores = list(ids), [], []
  while len(drawn) < count and not {0, 2} & {*drawn}:
    padded = jnp.array(ids + [0] * (64 - len(ids)))
    scored = np.asarray(log_probs(params, padded))[len(ids) - 1]
    drawn.append(int(scored.argmax()))
    scores.append(float(scored.max()))
    ids.append(drawn[-1])
  return drawn, scores


GREEDY = ["--temperature=0", "--max_new_tokens=12"]


def test_a_prompt_is_continued_as_the_model_has_it(draw, folder):
  (record,) = draw(f"--prompt={PROMPT}", *GREEDY)
  ids = tokenizers.pretrained(folder).encode(PROMPT)
  tokens, scores = likeliest(pretrained.read(folder)[1], ids, 12)
  assert record["tokens"] == tokens and record["prompt"] == PROMPT
  np.testing.assert_allclose(record["model_log_prob"], scores, atol=1e-4)
  assert record["pretrained"] == str(folder) and "step" not in record
  code = tokenizers.pretrained(folder)
  assert PROMPT + record["text"] == code.decode([*ids, *tokens])


def test_every_end_that_the_files_list_stops_a_sample_however_many_are_drawn_at_once(draw):
  others = json.dumps([i for i in range(320) if i not in (0, 2, 10, 11)])
  asked = [f"--prompt={PROMPT}", "--num_samples=12", "--max_new_tokens=6", "--temperature=6"]
  records = draw(*asked, f"--suppress_tokens={others}")
  assert {record["tokens"][-1] for record in records} >= {0, 2}
  for record in records:
    ended = record["tokens"][-1] in (0, 2)
    assert record["stop_reason"] == ("stop" if ended else "length")
    assert not {0, 2} & {*record["tokens"][:-1]}
  narrow = draw(*asked, f"--suppress_tokens={others}", "--batch_size=2")
  assert [record["tokens"] for record in narrow] == [record["tokens"] for record in records]


def test_tokens_beyond_the_vocabulary_are_no_text(draw):
  others = json.dumps([i for i in range(320) if i < 310])
  (record,) = draw(f"--prompt={PROMPT}", "--max_new_tokens=4", f"--suppress_tokens={others}")
  assert min(record["tokens"]) >= 310 and record["text"] == ""


def test_a_sequence_is_as_long_as_is_asked_for(command, draw, folder):
  length = len(tokenizers.pretrained(folder).encode(PROMPT))
  lengths = [f"--max_length={length + 5}", "--max_new_tokens=7"]
  (record,) = draw(f"--prompt={PROMPT}", "--suppress_tokens=[0, 2]", *lengths)
  assert len(record["tokens"]) == 5 and record["stop_reason"] == "length"
  asked = [f"--pretrained={folder}", "--prompt=a"]
  outcome = command(sample, *asked, "--max_length=513")
  assert outcome.status == 2 and "--max_length=513 is more than the model's 512" in outcome.err
  outcome = command(sample, *asked, "--max_length=20")
  assert outcome.status == 2 and "max_new_tokens=256 leaves no room" in outcome.err


def test_a_conversation_is_written_by_the_models_own_template(draw, folder, tmp_path, command):
  system = {"role": "system", "content": "Be brief."}
  user = {"role": "user", "content": PROMPT}
  turns = [user, {"role": "assistant", "content": "the mat"}, user]
  lines = [{"messages": turns, "seed": 3}, {"prompt": PROMPT}]
  (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  given, asked = draw("--chat", "--system=Be brief.", f"--prompts={tmp_path}/asked.jsonl", *GREEDY)
  assert given["messages"] == turns and asked["messages"] == [system, user]
  assert asked["prompt"] == (
    f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{PROMPT}<|im_end|>\n"
    "<|im_start|>assistant\n"
  )
  ids = tokenizers.pretrained(folder).encode(asked["prompt"])
  assert ids[0] == 1 and ids.count(2) == 2
  assert asked["tokens"] == likeliest(pretrained.read(folder)[1], ids, 12)[0]
  outcome = command(sample, f"--pretrained={folder}", "--chat", f"--prompt={PROMPT}", *GREEDY)
  assert outcome.out.startswith(PROMPT + "\n") and "<|im_start|>" not in outcome.out


@pytest.mark.peers
def test_transformers_answers_the_same(draw, folder):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what torch and transformers import
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers import Qwen2ForCausalLM  # noqa: F401  (imported lazily)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder)
  questions = ["Who sat?", "the mat and the cat", "ünï 漢字"]
  records = draw("--chat", *(f"--prompt={question}" for question in questions), *GREEDY)
  assert len({tuple(record["tokens"]) for record in records}) == 3
  for question, record in zip(questions, records, strict=True):
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(
      messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    drawn = model.generate(**ids, do_sample=False, max_new_tokens=12)[
      0, ids["input_ids"].shape[1] :
    ]
    assert record["tokens"] == drawn.tolist()
    assert record["text"] == tokenizer.decode(drawn, skip_special_tokens=True)


def test_adapters_are_merged_in(draw, folder, tmp_path):
  config, params = pretrained.read(folder)
  adapters = lora.init(jax.random.key(1), params, ["attention/(query|output)/kernel"], 2)
  noise = lambda b: jax.random.normal(jax.random.key(b.size), b.shape)
  adapters = {path: a._replace(b=noise(a.b)) for path, a in adapters.items()}
  peft_layout.write(tmp_path / "adapters", config, adapters, alpha=8.0, family="qwen2")
  (record,) = draw(f"--adapters={tmp_path}/adapters", f"--prompt={PROMPT}", *GREEDY)
  for i, layer in enumerate(params["layers"]):
    for name in ("query", "output"):
      a, b = adapters[f"layers/{i}/attention/{name}/kernel"]
      layer["attention"][name]["kernel"] += 4 * a @ b
  ids = tokenizers.pretrained(folder).encode(PROMPT)
  tokens, scores = likeliest(params, ids, 12)
  assert record["tokens"] == tokens and record["adapters"] == f"{tmp_path}/adapters"
  np.testing.assert_allclose(record["model_log_prob"], scores, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_weights_in_8_bits(draw, folder, kind):
  (record,) = draw(f"--quantise={kind}", f"--prompt={PROMPT}", *GREEDY)
  params = pretrained.read(folder)[1]
  stored = quantised.quantise(params, {"int8": "int8", "fp8": "float8_e4m3fn"}[kind])
  ids = tokenizers.pretrained(folder).encode(PROMPT)
  tokens, scores = likeliest(quantised.dequantise(stored), ids, 12)
  assert record["tokens"] == tokens and record["quantise"] == kind
  np.testing.assert_allclose(record["model_log_prob"], scores, atol=1e-4)
  exact = likeliest(params, [*ids, *tokens[:-1]], 1)[1][0]
  assert abs(record["model_log_prob"][-1] - exact) > 1e-4


def test_the_dtype_asked_for(folder):
  made, params, origin = launch.restore(str(folder), partition.make_mesh(), dtype="bfloat16")
  assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
  assert made.model_config.dtype == origin["dtype"] == "bfloat16"


def test_how_much_is_drawn_may_be_in_the_files(folder, tmp_path):
  mesh = partition.make_mesh()
  most = lambda model: launch.restore(str(model), mesh)[0].config.evaluation.max_new_tokens
  assert most(folder) == 256
  for path in folder.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7}))
  assert most(tmp_path) == 7


def test_runs_go_into_8_bits_too_and_have_nothing_of_pretrained(command, trained):
  asked = [f"--workdir={trained}", "--prompt=1+1="]
  outcome = command(sample, *asked, "--quantise=int8", "--batch_size=1", "--max_length=9")
  assert outcome.status == 0 and outcome.out.startswith("1+1=")
  for flag in ("--chat", "--adapters=here", "--dtype=bfloat16", "--system=a"):
    outcome = command(sample, *asked, flag)
    assert outcome.status == 2 and "means nothing here" in outcome.err


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--workdir=run"], "--workdir means nothing here"),
    (["--step=3"], "--step means nothing here"),
    (["--num_images=3"], "--num_images means nothing here"),
    (["--system=Be brief."], "--system is a message of a conversation: give --chat"),
    (["--adapters=none"], "none/adapter_config.json: no such file"),
    (["--mesh=data=3"], "does not fill the"),
    (["--dtype=float8"], "--dtype=float8"),
  ],
)
def test_flags_that_do_not_go_together(command, folder, flags, words):
  outcome = command(sample, f"--pretrained={folder}", "--prompt=a", *flags)
  assert outcome.status == 2 and words in outcome.err and outcome.err.count("\n") == 1


def test_directories_and_lines_that_are_not_right(command, folder, tmp_path):
  def refused(words, model, *arguments):
    outcome = command(sample, f"--pretrained={model}", *arguments)
    assert outcome.status == 2 and words in outcome.err and outcome.err.count("\n") == 1

  refused("there is no such directory", tmp_path / "none", "--prompt=a")
  refused("no tokenizer file", tmp_path, "--prompt=a")
  write_tokenizer(tmp_path)
  refused("config.json: no such file", tmp_path, "--prompt=a")
  (tmp_path / "tokenizer_config.json").write_text("{}")
  refused("has no chat template", tmp_path, "--prompt=a", "--chat")
  refused("this model has none: give --prompt", folder, "--num_problems=2", "--max_new_tokens=3")
  path = tmp_path / "lines.jsonl"
  for line, words in {
    '{"messages": [{"role": "user", "content": "a"}]}': "has messages: give --chat",
    '{"messages": [], "prompt": "a"}': "messages are a list, in place of a prompt",
    '{"messages": "a"}': "messages are a list, in place of a prompt",
  }.items():
    path.write_text(line + "\n")
    refused(words, folder, f"--prompts={path}")
  path.write_text('{"messages": [{"content": "a"}]}\n')
  refused("A message is an object of role and content", folder, f"--prompts={path}", "--chat")


def test_several_processes_are_refused(command, folder, tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  outcome = command(sample, f"--pretrained={folder}", "--prompt=a")
  assert outcome.status == 2 and "drawn by one process, and there are 2" in outcome.err
  outcome = command(export, f"--workdir={folder}", f"--output={tmp_path / 'new'}")
  assert outcome.status == 2 and "One process exports, and there are 2" in outcome.err


@pytest.mark.slow
def test_on_eight_devices():
  assert "skipped" not in targets.run_on_eight_devices(__file__)


def eight_devices_hold_their_parts_and_draw_the_same(command, folder):
  mesh = partition.make_mesh(data=2, fsdp=2, tensor=2)
  _, params, _ = launch.restore(str(folder), mesh)
  kernel = params["layers"][0]["attention"]["query"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape) == (16, 16)
  outcomes = [
    command(
      *(sample, f"--pretrained={folder}", f"--prompt={PROMPT}", "--num_samples=8"),
      *("--max_new_tokens=6", f"--mesh={mesh}", *more),
    )
    for mesh in ("data=8", "fsdp=2,tensor=2")
    for more in ((), ("--quantise=int8",))
  ]
  assert [outcome.status for outcome in outcomes] == [0] * 4, outcomes
  assert outcomes[0].out == outcomes[2].out and outcomes[1].out == outcomes[3].out
  assert len(set(outcomes[0].out.splitlines())) > 2


def eight_devices_merge_adapters_where_the_weights_are(folder, tmp_path):
  config, params = pretrained.read(folder)
  adapters = lora.init(jax.random.key(1), params, ["kernel"], 2)
  ones = {path: a._replace(b=jnp.ones_like(a.b)) for path, a in adapters.items()}
  peft_layout.write(tmp_path / "adapters", config, ones, alpha=2.0, family="qwen2")
  mesh = partition.make_mesh(data=1, fsdp=4, tensor=2)
  _, found, _ = launch.restore(str(folder), mesh, adapters=str(tmp_path / "adapters"))
  merged = lora.merge(params, ones, 1.0)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, merged)
  kernel = found["layers"][1]["mlp"]["down"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape) == (32, 8)
