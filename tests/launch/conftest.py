"""Binaries run inside the test's process, tiny overrides of a configuration, and snapshots."""

import pathlib
import sys
import warnings
from typing import NamedTuple

import jax
import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver

from ancestral.launch import flags, train

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
  return tmp_path_factory.mktemp("compiled")


@pytest.fixture(autouse=True)
def compiles_once(compiled, monkeypatch):
  """Programs are compiled once, and without optimisations, in other processes too."""
  settings = {
    "jax_disable_most_optimizations": True,
    "jax_compilation_cache_dir": str(compiled),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
  }
  before = {name: jax.config.values[name] for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
    monkeypatch.setenv(name.upper(), str(value))
  yield
  for name, value in before.items():
    jax.config.update(name, value)


class Outcome(NamedTuple):
  status: int
  out: str
  err: str


@pytest.fixture
def command(monkeypatch, capsys):
  """(binary, *arguments) -> Outcome, as `python -m` would have it but for the process."""

  def run(binary, *arguments):
    argv = [binary.__name__, *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", argv)  # config_flags looks for overrides there
    capsys.readouterr()
    status = 0
    with flagsaver.flagsaver(), warnings.catch_warnings():
      warnings.filterwarnings("ignore", r"the load_module\(\) method", DeprecationWarning)
      absl_flags.FLAGS.unparse_flags()
      try:
        binary.main(flags.parse(argv, binary.READS))
      except SystemExit as stop:
        status = stop.code
    return Outcome(status, *capsys.readouterr())

  return run


def _overrides(fields):
  return [f"--config.{field}={value}" for field, value in fields.items()]


@pytest.fixture(scope="session")
def tiny():
  """(config, **fields with __ for the dot) -> arguments of a run that takes a second."""

  def arguments(config="arithmetic.py", **fields):
    return [
      f"--config={ROOT / 'configs' / config}",
      *_overrides(
        {
          "model.num_layers": 1,
          "model.width": 16,
          "model.num_heads": 2,
          "train.num_steps": 4,
          "train.batch_size": 8,
          "train.save_every": 2,
          "train.log_every": 1,
          "train.evaluate_every": 4,
          "optimizer.name": "adamw",
          "optimizer.warmup_fraction": 0.25,
          "evaluation.batch_size": 8,
          **(
            {"evaluation.num_problems": 3, "evaluation.num_samples": 2}
            if config.startswith(("arithmetic", "masked_lm.py:arithmetic", "masked_lm.py:sudoku"))
            else {"evaluation.num_batches": 2}
          ),
          **{name.replace("__", "."): value for name, value in fields.items()},
        }
      ),
    ]

  return arguments


@pytest.fixture(scope="session")
def snapshot():
  """(folder) -> every file's bytes, to see that nothing changed; {} where there is no folder."""
  return lambda folder: {
    path.relative_to(folder): path.read_bytes() if path.is_file() else None
    for path in pathlib.Path(folder).rglob("*")
  }


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory):
  return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def trained(command, tiny, trained_folder):
  """A workdir with a run of 4 steps, made once."""
  if not trained_folder.exists():
    assert command(train, f"--workdir={trained_folder}", *tiny()).status == 0
  return trained_folder


@pytest.fixture(scope="session")
def masked_texts(tmp_path_factory):
  folder = tmp_path_factory.mktemp("texts")
  for i in range(20):
    (folder / f"{i}.txt").write_text(f"the number {i} comes after {i - 1} " * 8)
  return folder


@pytest.fixture
def masked_arguments(tiny, masked_texts):
  """Arguments of a run of a variant that takes seconds."""

  def arguments(variant, **changes):
    settings = {"model__num_layers": 1, **changes}
    if not variant.startswith(("arithmetic", "sudoku")):
      settings |= {"data__folder": masked_texts, "data__pattern": "*.txt", "data__row_length": 32}
    return tiny(f"masked_lm.py:{variant}", **settings)

  return arguments


@pytest.fixture(scope="session")
def masked_runs(tmp_path_factory):
  return tmp_path_factory.mktemp("masked")


@pytest.fixture
def masked_run(command, masked_arguments, masked_runs):
  """The workdir of a trained run of a variant, made once; that of sums knows masked prompts."""

  def workdir(variant):
    path = masked_runs / variant
    if not path.exists():
      changes = {"loss__unconditional": 0.1} if variant == "arithmetic" else {}
      outcome = command(train, f"--workdir={path}", *masked_arguments(variant, **changes))
      assert outcome.status == 0, outcome.err
    return path

  return workdir
