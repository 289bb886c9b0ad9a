"""Training from a pretrained directory: all parameters or adapters, then learning from samples."""

import json
import shutil

import jax
import numpy as np
import pytest

import targets
from ancestral.configs import finetune, policy
from ancestral.launch import adapters, evaluate, experiment, export, fields, plan, sample, train
from ancestral.models import pretrained, transformer
from ancestral.training import checkpoint, chips, metrics

tokenizers = pytest.importorskip("tokenizers")

CHARACTERS = "0123456789+= abcdefghijklmnopqrstuvwxyz"
TINY = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "width": 32, "max_length": 64}
FINETUNE = "configs/finetune.py"


def flags_of(**values):
  return [f"--config.{name.replace('__', '.')}={value}" for name, value in values.items()]


FEW = {
  "model__dtype": "float32",
  "train__num_steps": 4,
  "train__batch_size": 8,
  "train__log_every": 1,
  "train__evaluate_every": 4,
  "train__save_every": 2,
  "optimizer__peak": 1e-2,
}
SUMS = flags_of(
  **FEW,
  task__levels=(1,),
  evaluation__num_problems=4,
  evaluation__num_samples=2,
  evaluation__batch_size=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A pretrained model of 41 characters, with a tokenizer, as transformers would save it."""
  path = tmp_path_factory.mktemp("pretrained") / "model"
  vocabulary = {"<s>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate(CHARACTERS)}}
  config = transformer.TransformerConfig(vocab_size=len(vocabulary), qkv_bias=True, **TINY)
  params = targets.fixed_params(transformer.transformer(config))
  ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
  assert pretrained.write(path, config, params, family="qwen2", token_ids=ids) == "qwen2"
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="</s>"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
  made.decoder = tokenizers.decoders.Fuse()
  made.add_special_tokens(["<s>", "</s>"])
  made.save(str(path / "tokenizer.json"))
  return path


@pytest.fixture
def pairs(tmp_path):
  path = tmp_path / "pairs.jsonl"
  lines = [{"prompt": f"say {c}= ", "answer": c * 3} for c in "abcdefghij" * 4]
  path.write_text("\n".join(map(json.dumps, lines)))
  return path


def losses(workdir):
  return [m["loss"] for m in metrics.read_jsonl(workdir / "metrics.jsonl") if "loss" in m]


def restored(workdir, **kwargs):
  return experiment.restore_params(None, str(workdir), **kwargs)[1]


def test_all_parameters(command, folder, pairs, tmp_path):
  run = [f"--config={FINETUNE}:pairs", f"--config.start.pretrained={folder}"]
  run += [f"--config.data.path={pairs}", "--config.data.row_length=48"]
  run += flags_of(**FEW, evaluation__max_new_tokens=4)
  outcome = command(train, f"--workdir={tmp_path / 'run'}", *run)
  assert outcome.status == 0, outcome.err
  built, params, step = experiment.restore_params(None, str(tmp_path / "run"))
  assert step == 4 and losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
  assert built.model_config.qkv_bias and built.tokenizer.vocab_size == 41
  config, start = pretrained.read(folder)
  assert dict(vars(built.model_config), remat="none") == vars(config)
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params, start)
  assert min(jax.tree.leaves(moved["layers"][0]["attention"]["query"])) > 0
  outcome = command(sample, f"--workdir={tmp_path / 'run'}", "--prompt=say a= ")
  assert outcome.status == 0, outcome.err


@pytest.fixture(scope="module")
def sums_folder(tmp_path_factory):
  return tmp_path_factory.mktemp("sums") / "run"


@pytest.fixture
def sums(command, folder, sums_folder):
  """A run of adapters of four steps, made once."""
  if not sums_folder.exists():
    outcome = tune_sums(command, folder, sums_folder)
    assert outcome.status == 0, outcome.err
  return sums_folder


def tune_sums(command, folder, workdir, *more):
  return command(
    train,
    f"--config={FINETUNE}:sums",
    f"--config.start.pretrained={folder}",
    f"--workdir={workdir}",
    "--config.lora.rank=4",
    *SUMS,
    *more,
  )


def test_adapters(command, folder, sums):
  """They change what they are of and no more; checkpoints are of their size."""
  start = pretrained.read(folder)[1]
  params = restored(sums)
  changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), params, start)
  layer = changed["layers"][1]
  for name in ("query", "key", "value", "output"):
    assert layer["attention"][name]["kernel"]
  assert layer["mlp"]["up"]["kernel"] and not layer["attention_norm"]["scale"]
  assert not changed["embedding"] and not layer["attention"]["query"]["bias"]
  with checkpoint.open_manager(sums / "checkpoints", create=False) as manager:
    made = experiment.build(fields.Config(checkpoint.load_config(sums / "checkpoints")).lock())
    held = checkpoint.restore_part(
      manager, jax.eval_shape(made.init_params, jax.random.key(0)), "params"
    )
  ranks = {a.shape[-1] for a, _ in held.state.values()}
  assert ranks == {4} and len(held.state) == 7
  outcome = command(evaluate, f"--workdir={sums}")
  assert outcome.status == 0, outcome.err


def test_a_stopped_run_of_adapters_goes_on(command, folder, sums, tmp_path):
  shutil.copytree(sums, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
  outcome = tune_sums(command, folder, tmp_path / "run")
  assert outcome.status == 0 and "from step 2 to 4" in outcome.err
  jax.tree.map(np.testing.assert_array_equal, restored(tmp_path / "run"), restored(sums))
  assert losses(tmp_path / "run") == losses(sums)


def test_learning_from_samples_with_adapters(command, sums, tmp_path):
  """Of a model that was tuned by adapters itself: it starts whole, and the ratio begins at 1."""
  run = tmp_path / "rl"
  outcome = command(
    train,
    "--config=configs/policy.py:grpo",
    f"--workdir={run}",
    f"--config.start.workdir={sums}",
    "--config.lora.rank=2",
    *flags_of(
      train__num_steps=2,
      train__batch_size=2,
      train__save_every=2,
      train__evaluate_every=2,
      rollouts__group_size=4,
      rollouts__num_workers=1,
      method__advantage="reward",
      rollouts__reward="random",
      evaluation__num_problems=4,
      evaluation__num_samples=1,
      evaluation__batch_size=8,
    ),
  )
  assert outcome.status == 0, outcome.err
  seen = [m for m in metrics.read_jsonl(run / "metrics.jsonl") if "ratio" in m]
  assert seen and all(abs(m["ratio"] - 1) < 1e-4 for m in seen)
  params, before = restored(run), restored(sums)
  kernel = lambda params: params["layers"][0]["mlp"]["up"]["kernel"]
  assert np.any(kernel(params) != kernel(before))
  np.testing.assert_array_equal(params["embedding"], before["embedding"])


def test_adapters_go_to_another_library_and_come_back(command, folder, sums, tmp_path):
  """Merged, or as PEFT has them beside the pretrained directory: the same texts."""
  for layout in ("peft", "transformers"):
    flags = [f"--workdir={sums}", f"--output={tmp_path / layout}", f"--layout={layout}"]
    outcome = command(export, *flags)
    assert outcome.status == 0, outcome.err
  assert (tmp_path / "peft" / "adapter_model.safetensors").exists()
  ask = ["--prompt=12+3=", "--num_samples=4", "--max_new_tokens=6"]
  drawn = [
    command(sample, *where, *ask).out
    for where in (
      [f"--workdir={sums}"],
      [f"--pretrained={folder}", f"--adapters={tmp_path / 'peft'}"],
      [f"--pretrained={tmp_path / 'transformers'}"],
      [f"--pretrained={folder}"],
    )
  ]
  assert drawn[0] == drawn[1] == drawn[2] != drawn[3]


def test_adapters_are_of_one_start(command, folder, sums, tmp_path):
  """Wherever that lies by now; but of other parameters they mean nothing."""
  flags = [f"--config={FINETUNE}:sums", "--config.lora.rank=4", *SUMS]
  moved, other = tmp_path / "moved", tmp_path / "other"
  shutil.copytree(folder, moved)
  outcome = command(evaluate, f"--workdir={sums}", *flags, f"--config.start.pretrained={moved}")
  assert outcome.status == 0, outcome.err
  config, params = pretrained.read(folder)
  shutil.copytree(folder, other)
  (other / "model.safetensors").unlink()
  params = jax.tree.map(lambda leaf: 1.5 * leaf, params)
  pretrained.write(tmp_path / "written", config, params, family="qwen2")
  shutil.copy(tmp_path / "written" / "model.safetensors", other)
  outcome = command(evaluate, f"--workdir={sums}", *flags, f"--config.start.pretrained={other}")
  assert outcome.status == 2 and "config.start has other parameters" in outcome.err


def test_adapters_of_a_run_that_went_on(command, folder, sums, tmp_path):
  """Evaluated by the command they were trained with, they change what they changed then."""
  start, run = tmp_path / "start", tmp_path / "run"
  shutil.copytree(sums, start)
  learn = [
    "--config=configs/policy.py:raft",
    f"--config.start.workdir={start}",
    "--config.lora.rank=2",
    *flags_of(
      train__num_steps=1,
      train__batch_size=2,
      rollouts__group_size=2,
      rollouts__num_workers=1,
      evaluation__num_problems=2,
      evaluation__num_samples=1,
      evaluation__batch_size=8,
    ),
  ]
  assert command(train, f"--workdir={run}", *learn).status == 0
  before = restored(run)
  more = [
    f"--config={FINETUNE}:sums",
    f"--config.start.pretrained={folder}",
    "--config.lora.rank=4",
  ]
  flags = [*more, *SUMS, "--config.train.num_steps=6"]
  assert command(train, f"--workdir={start}", *flags).status == 0
  outcome = command(evaluate, f"--workdir={run}", *learn)
  assert outcome.status == 0, outcome.err
  jax.tree.map(np.testing.assert_array_equal, restored(run), before)


def test_runs_from_before_there_were_adapters_go_on():
  config = policy.get_config("grpo").to_dict()
  old = {name: value for name, value in config.items() if name != "lora"}
  assert adapters.compared(config) == old == adapters.compared(old)
  config["lora"]["rank"] = 4
  assert adapters.compared(config) == config


@pytest.mark.parametrize(
  "flags, message",
  [
    (
      ["--config.lora.targets=('nothing',)"],
      "config.lora: No matrix's path has the pattern 'nothing'",
    ),
    (["--config.lora.rank=0"], "config.lora: rank=0 is not at least 1"),
    (["--config.data.row_length=65"], "config.data.row_length is more than the model's 64"),
    (
      ["--config.start.pretrained=/nowhere"],
      "config.start.pretrained is '/nowhere', which does not",
    ),
    (["--config.start.pretrained="], "config.start is empty; name a pretrained directory"),
  ],
)
def test_bad_input_is_one_line(command, folder, tmp_path, flags, message):
  outcome = tune_sums(command, folder, tmp_path / "run", *flags)
  assert outcome.status == 2 and message in outcome.err and outcome.err.count("\n") == 1


def test_a_plan_of_adapters(folder):
  """The optimiser keeps two moments of adapters alone."""
  config = finetune.get_config("sums")
  with config.unlocked():
    config.start.pretrained, config.model.dtype = str(folder), "float32"
  whole = plan.plan(config, chips.H100, 1)
  with config.unlocked():
    config.lora.rank = 4
  few = plan.plan(config, chips.H100, 1)
  assert few.num_params == whole.num_params and few.held.frozen == whole.held.params
  assert few.held.optimizer < 2.1 * few.held.params < whole.held.optimizer
