"""Flags that the binaries share, runs they stand for, and errors in one line."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Experiment, such as configs/arithmetic.py or configs/arithmetic.py:small.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints and metrics.")
SEEDS = flags.DEFINE_list("seeds", None, "Several runs, one for each seed: --seeds=0,1,2.")
SWEEP = flags.DEFINE_multi_string(
  "sweep", [], "Several runs, over a field's values: --sweep=optimizer.peak=1e-3,3e-3. Repeated, "
  "it makes the grid.")


def run(main: Callable[[list[str]], None]) -> None:
  """`app.run`, with errors of the command line, of configurations and of input in one line."""
  logging.set_verbosity(logging.WARNING)
  with one_line_errors():
    remaining = flags.FLAGS(sys.argv)
  app.run(main, argv=remaining, flags_parser=lambda argv: argv)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
  """Bad input ends the program with its message and status 2, without a traceback.

  It is for set-up, where ValueErrors and missing files are the user's to mend; a traceback from the
  middle of a run is kept.
  """
  try:
    yield
  except (flags.Error, ValueError, FileNotFoundError, KeyError, AttributeError, TypeError) as error:
    message = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def required(flag: flags.FlagHolder) -> str:
  """The value of a flag that has no default.

  Raises:
    ValueError: it was not given.
  """
  if not flag.value:
    raise ValueError(f"--{flag.name} is missing: give --{flag.name}=... ({flag.help})")
  return flag.value


def runs() -> list[tuple[str, ml_collections.ConfigDict]]:
  """Every run that --config, --seeds and --sweep stand for, with its workdir.

  A single run uses --workdir itself; several use a directory each below it, named by what differs,
  such as seed=1,optimizer.peak=0.003.

  Raises:
    ValueError: a flag is missing, or sweeps what the configuration does not have.
  """
  config, workdir = required(CONFIG), required(WORKDIR)
  axes = []
  for sweep in SWEEP.value:
    field, equals, values = sweep.partition("=")
    if not equals or not values:
      raise ValueError(f"--sweep={sweep} is not of the form field=value,value.")
    axes.append([(field, value) for value in values.split(",")])
  if SEEDS.value:
    axes.append([("seed", value) for value in SEEDS.value])
  if not axes:
    return [(workdir, config)]
  return [(f"{workdir}/{','.join(f'{field}={value}' for field, value in point)}",
           _override(config, point)) for point in itertools.product(*axes)]


def _override(config, point) -> ml_collections.ConfigDict:
  """A copy with fields set from their text, read as the type that they have."""
  config = config.copy_and_resolve_references()
  for field, text in point:
    *path, name = field.split(".")
    parent = config
    for part in path:
      parent = parent.get(part) if isinstance(parent, ml_collections.ConfigDict) else None
    if not isinstance(parent, ml_collections.ConfigDict) or name not in parent:
      raise ValueError(f"--sweep={field}=...: the configuration has no field {field!r}.")
    parent[name] = _parse(field, text, parent[name])
  return config.lock()


def _parse(field, text, old):
  kinds = {bool: lambda text: {"true": True, "false": False}[text.lower()], int: int, float: float,
           str: str}
  if type(old) not in kinds:
    raise ValueError(f"--sweep={field}=...: only numbers, strings and booleans can be swept.")
  try:
    return kinds[type(old)](text)
  except (ValueError, KeyError):
    raise ValueError(f"--sweep={field}={text}: the field is of type {type(old).__name__}.") from None
