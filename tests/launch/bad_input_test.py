"""Bad input is one line on stderr that names the culprit, exit status 2, and changes nothing."""

import subprocess
import sys
import types

import pytest

from ancestral.launch import evaluate, quickstart, sample, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("bad_input")


def check(outcome, *words):
  assert outcome.status == 2, outcome
  assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
  assert "Traceback" not in outcome.err
  for word in words:
    assert word in outcome.err, outcome.err


# Words that the message has to have: the culprit, and what to do.
OVERRIDES = {
  "optimzer.peak=1": ("optimzer", 'Did you mean "optimizer"'),
  "train.num_step=3": ("num_step", 'Did you mean "num_steps"'),
  "train.num_steps.x=3": ("train.num_steps.x",),
  "train.num_steps=abc": ("--config.train.num_steps=abc",),
  "train.num_steps=2.5": ("--config.train.num_steps=2.5",),
  "optimizer.peak=abc": ("--config.optimizer.peak=abc",),
  "optimizer.peak=-1.0": ("config.optimizer.peak", "above 0"),
  "optimizer.name=adamm": ("config.optimizer.name", "'adamm'", "adamw, muon"),
  "optimizer.schedule=cosine": ("'cosine'", "warmup_cosine, warmup_stable_decay"),
  "optimizer.warmup_fraction=1.5": ("config.optimizer.warmup_fraction is 1.5", "[0, 1)"),
  "data.rows=padd": ("'padd'", "concatenate, first_fit, pad"),
  "data.source=text": ("config.data.source", "'text'", "task"),
  "data.row_length=3": ("config.data.row_length is 3", "raise them"),
  "task.name=add": ("'add'", "addition, expressions, multiplication, subtraction"),
  "task.style=reverse": ("'reverse'", "detailed, plain, reversed, simplified"),
  "task.style=detailed": ("config.evaluation.max_new_tokens is 5", "answers", "raise them"),
  "task.levels=(0,)": ("levels", "0"),
  "task.test_percent=101": ("test_percent is 101", "from 0 to 100"),
  "model.dtype=float23": ("config.model.dtype", "'float23'", "bfloat16, float16, float32"),
  "model.dropout=2.0": ("dropout=2.0", "[0, 1)"),
  "model.num_heads=3": ("width=16", "num_heads=3"),
  "model.positions=rotation": ("positions='rotation'", "learned"),
  "model.num_layers=0": ("config.model.num_layers is 0", "at least 1"),
  "loss.chunk=0": ("config.loss.chunk is 0", "at least 1"),
  "seed=-1": ("config.seed is -1", "at least 0"),
  "train.batch_size=0": ("config.train.batch_size is 0", "at least 1"),
  "train.num_microbatches=3": ("config.train.num_microbatches=3", "config.train.batch_size=8"),
  "train.num_microbatches=0": ("config.train.num_microbatches is 0", "at least 1"),
  "train.log_every=0": ("config.train.log_every is 0",),
  "train.evaluate_every=0": ("config.train.evaluate_every is 0",),
  "train.save_every=0": ("config.train.save_every is 0",),
  "train.keep=0": ("config.train.keep is 0",),
  "train.average_decay=1.0": ("config.train.average_decay is 1.0", "[0, 1)"),
  "evaluation.num_problems=0": ("config.evaluation.num_problems is 0",),
  "evaluation.temperature=-1.0": ("config.evaluation.temperature is -1.0", "at least 0"),
  "evaluation.max_new_tokens=100": ("config.evaluation.max_new_tokens is 100", "raise them"),
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_an_override(command, tiny, folder, override):
  workdir = folder / override
  check(
    command(train, f"--workdir={workdir}", *tiny(), f"--config.{override}"), *OVERRIDES[override]
  )
  assert not workdir.exists()


@pytest.mark.parametrize(
  "extra, words",
  [
    ("--nosuch=1", ("'nosuch'",)),
    ("runs/one", ("'runs/one'", "--name=value")),
    ("--step=2", ("--step",)),
    ("--sweep=optimizer.peek=1", ("optimizer.peek", "no such field")),
    ("--sweep=optimizer.peak=1e-3,x", ("optimizer.peak", "'x'", "float")),
    ("--sweep=train.batch_size=1.5", ("train.batch_size", "'1.5'", "int")),
    ("--sweep=optimizer=1", ("optimizer", "numbers, strings and booleans")),
    ("--sweep=optimizer.peak", ("--sweep=optimizer.peak", "field=value,value")),
    ("--sweep=optimizer.name=adamw,adamm", ("'adamm'", "adamw, muon")),
    ("--seeds=0,a", ("seed", "'a'", "int")),
    ("--seeds=", ("--seeds is empty", "--seeds=0,1,2")),
    ("--seeds=0,1,0", ("seed takes a value twice", "0,1,0")),
  ],
)
def test_a_flag(command, tiny, folder, extra, words):
  workdir = folder / "absent"
  check(command(train, f"--workdir={workdir}", *tiny(), extra), *words)
  assert not workdir.exists()


def test_a_configuration(command, tiny, folder):
  workdir = folder / "absent"
  for config, words in [
    ("arithmetic.py:tinny", ("'tinny'", "tiny, small, paper")),
    ("arithmetik.py", ("arithmetik.py", "No such file")),
    ("text.py:folders", ("'folders'", "folder, jsonl, tfds")),
    ("text.py:jsonl", ("config.data.path is ''", "give one")),
    ("text.py:tfds", ("'wiki40b/en'", "download_and_prepare")),
  ]:
    check(command(train, f"--workdir={workdir}", tiny(config)[0]), *words)
  check(
    command(train, f"--workdir={workdir}", *tiny("text.py"), f"--config.data.folder={workdir}"),
    str(workdir),
    "check the path",
  )
  check(
    command(
      train,
      f"--workdir={workdir}",
      *tiny("text.py"),
      "--config.tokenizer.name=file",
      "--config.tokenizer.path=absent.json",
    ),
    "absent.json",
    "give one",
  )
  assert not workdir.exists()


def test_a_missing_flag(command, tiny):
  check(command(train, *tiny()), "--workdir is missing", "give --workdir=")
  check(command(train, "--workdir=absent"), "--config is missing", "give --config=")
  for binary in (evaluate, sample, quickstart):
    check(command(binary), "--workdir is missing")


def test_an_override_before_its_file(command, folder):
  workdir = f"--workdir={folder / 'absent'}"
  outcome = command(evaluate, workdir, "--config.evaluation.num_samples=2")
  check(outcome, "--config.evaluation.num_samples", "--config=FILE before it")


def test_help_is_no_error(command):
  outcome = command(train, "--help")
  assert outcome.status == 1 and "USAGE" in outcome.out  # absl ends --help with 1
  assert "error:" not in outcome.err


def test_a_workdir_without_checkpoints(command, folder):
  for workdir in (folder / "absent", folder):
    check(command(evaluate, f"--workdir={workdir}"), str(workdir), "train first")
    check(command(sample, f"--workdir={workdir}", "--prompt=1+1="), str(workdir), "train first")
  assert not (folder / "absent").exists() and not (folder / "checkpoints").exists()


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["--step=3"], ("no checkpoint of step 3", "[2, 4]")),
    (["--seeds=1"], ("--seeds",)),
  ],
)
def test_a_checkpoint_to_evaluate(command, trained, snapshot, arguments, words):
  before = snapshot(trained)
  check(command(evaluate, f"--workdir={trained}", *arguments), *words)
  assert snapshot(trained) == before


@pytest.mark.parametrize(
  "arguments, words",
  [
    ([], ("either --prompt=TEXT, --prompts=FILE or --num_problems=N",)),
    (["--prompt=1+1=", "--num_problems=2"], ("either --prompt=TEXT",)),
    (["--prompt=1x1="], ("'x'", "position 1", "alphabet")),
    (["--prompt=1234567890+1="], ("Prompt 0", "14 tokens", "1 to 13")),
    (["--prompt=1+1=", "--max_new_tokens=100"], ("max_new_tokens=100", "14 tokens", "lower it")),
    (["--prompt=1+1=", "--num_samples=0"], ("--num_samples=0",)),
    (["--prompt=1+1=", "--temperature=-1"], ("temperature(-1.0)", "at least 0")),
    (["--prompt=1+1=", "--temperature=hot"], ("--temperature=hot", "not JSON")),
    (["--prompt=1+1=", "--top_p=[1]"], ("--top_p=[1]", "not a number")),
    (["--prompt=1+1=", "--suppress_tokens=[[1]]"], ("--suppress_tokens=", "list of tokens")),
    (["--num_problems=2", "--stop=1"], ("--stop", "leave it out")),
    (["--prompt=1+1=", "--temp=1"], ("--temp is no setting of --preset=transformers", "top_p")),
    (["--prompt=1+1=", "--preset=llamacp"], ("--preset=llamacp", "llamacpp")),
    (["--num_problems=-1"], ("--num_problems=-1",)),
    (["--prompt=1+1=", "--step=3"], ("no checkpoint of step 3",)),
    (["--prompt=1+1=", "--output=absent/x.jsonl"], ("--output=absent/x.jsonl", "make it")),
    (["--prompt=1+1=", "--resume"], ("--resume", "--output")),
    (["--prompts=absent.txt"], ("absent.txt",)),
  ],
)
def test_a_sample(command, trained, snapshot, arguments, words):
  before = snapshot(trained)
  check(command(sample, f"--workdir={trained}", *arguments), *words)
  assert snapshot(trained) == before


@pytest.mark.parametrize(
  "line, words",
  [
    ('{"prompt": "1+1="', ("line 2", "prompt, max_new_tokens, seed, stop, settings")),
    ('{"promt": "1+1="}', ("line 2", "promt")),
    ('{"prompt": 3}', ("line 2", "prompt is 3")),
    ('{"seed": 3}', ("line 2", "prompt is None")),
    ('{"prompt": "1+1=", "stop": [3]}', ("line 2", "stop is [3]")),
    ('{"prompt": "1+1=", "settings": {"temperature": null}}', ("Request 1", "it is a number")),
    ('{"prompt": "1+1=", "settings": {"top_p": 0.5}}', ("A line sets top_p", "give --top_p too")),
    ('{"prompt": "1+1=", "max_new_tokens": 0}', ("Request 1", "max_new_tokens=0")),
  ],
)
def test_a_line_of_prompts(command, trained, tmp_path, line, words):
  (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1="}\n' + line + "\n")
  check(command(sample, f"--workdir={trained}", f"--prompts={tmp_path}/prompts.jsonl"), *words)


def test_what_is_written_is_not_overwritten_nor_mixed(command, trained, tmp_path):
  again = [f"--workdir={trained}", "--prompt=1+1=", f"--output={tmp_path}/samples.jsonl"]
  assert command(sample, *again).status == 0
  written = (tmp_path / "samples.jsonl").read_bytes()
  check(command(sample, *again), "exists", "--resume")
  check(command(sample, *again, "--resume", "--seed=3"), "run_seed 0", "would have 3")
  check(command(sample, *again, "--resume", "--top_k=3"), "settings")
  notes = tmp_path / "notes.txt"
  notes.write_text("one line, and no end of it")
  other = [*again[:2], f"--output={notes}", "--resume"]
  check(command(sample, *other), "notes.txt is no file of samples")
  assert notes.read_text() == "one line, and no end of it"
  assert (tmp_path / "samples.jsonl").read_bytes() == written


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"model__width": 32}, ("config.model.width is 32", "has 16", "new workdir")),
    ({"task__name": "subtraction"}, ('config.task.name is "subtraction"', 'has "addition"')),
    ({"task__test_percent": 20}, ("config.task.test_percent is 20", "has 10")),
  ],
)
@pytest.mark.parametrize("binary", [train, evaluate, sample])
def test_a_configuration_that_is_not_the_checkpoints(
  command, tiny, trained, snapshot, binary, fields, words
):
  before = snapshot(trained)
  prompt = ["--prompt=1+1="] if binary is sample else []
  check(command(binary, f"--workdir={trained}", *tiny(**fields), *prompt), *words)
  assert snapshot(trained) == before


def test_another_experiment_altogether(command, tiny, trained, snapshot):
  before = snapshot(trained)
  check(command(train, f"--workdir={trained}", *tiny("text.py")), "new workdir")
  check(command(train, f"--workdir={trained}", *tiny(optimizer__peak=0.5)), "optimizer.peak is 0.5")
  assert snapshot(trained) == before


def test_in_a_process_of_its_own(tiny, folder):
  arguments = [f"--workdir={folder / 'absent'}", *tiny(), "--config.optimzer.peak=1"]
  done = subprocess.run(
    [sys.executable, "-m", "ancestral.launch.train", *arguments],
    text=True,
    capture_output=True,
    check=False,
  )
  check(types.SimpleNamespace(status=done.returncode, err=done.stderr), "optimzer", "optimizer")
  assert not (folder / "absent").exists()
