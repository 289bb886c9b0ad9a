"""Flags that the binaries share, runs they stand for, and errors in one line."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from ..models import partition

app.define_help_flags()  # app.run defines them only after `parse` has read the command line

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Experiment, such as configs/arithmetic.py or configs/arithmetic.py:small."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints and metrics.")
SEEDS = flags.DEFINE_list("seeds", None, "Several runs, one for each seed: --seeds=0,1,2.")
SWEEP = flags.DEFINE_multi_string(
  "sweep",
  [],
  "Several runs, over a field's values: --sweep=optimizer.peak=1e-3,3e-3. Repeated, "
  "it makes the grid.",
)
LAST = flags.DEFINE_bool("last", False, "Use the last parameters, not their average.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to take; the latest by default.")
AVERAGE_STD = flags.DEFINE_float(
  "average_std",
  None,
  "Average of the parameters over this share of training, of those that the run can make: see "
  "train.average_stds.",
)
MESH = flags.DEFINE_string(
  "mesh", None, "Devices along the axes of models.partition, such as fsdp=4,tensor=2; all by rows."
)
BEST = flags.DEFINE_bool("best", False, "Take the checkpoint that evaluated best in training.")


PROFILE = flags.DEFINE_bool(
  "profile", False, "Write a trace of four steps to WORKDIR/profile, for xprof or Perfetto."
)
COMMON = (CONFIG, WORKDIR, SEEDS, SWEEP, LAST, STEP, AVERAGE_STD, BEST, MESH, PROFILE)
CHECKPOINT = (CONFIG, WORKDIR, LAST, STEP, AVERAGE_STD, BEST, MESH)  # what `checkpoint` reads


def run(main: Callable[[list[str]], None], reads: Sequence[flags.FlagHolder]) -> None:
  """`app.run`, with errors of the command line, of configurations and of input in one line.

  Args:
    main: of the binary.
    reads: the flags above that it reads.
  """
  logging.set_verbosity(logging.WARNING)
  app.run(main, argv=parse(sys.argv, reads), flags_parser=lambda argv: argv)


def parse(argv: list[str], reads: Sequence[flags.FlagHolder]) -> list[str]:
  """Sets the flags from `argv`; what would be ignored is an error, which ends the program."""
  with one_line_errors():
    try:
      remaining = flags.FLAGS(argv)
    except (KeyError, AttributeError) as error:  # what config_flags makes of an unknown field
      raise ValueError(f"--config has no field {_message(error)}") from None
    except flags.UnrecognizedFlagError as error:
      if error.flagname.startswith("config."):
        raise ValueError(f"--{error.flagname} needs --config=FILE before it.") from None
      raise
    if remaining[1:]:
      raise ValueError(f"{remaining[1]!r} is not a flag: flags are written --name=value.")
    refuse_others(COMMON, reads)
  return remaining


def refuse_others(defined: Iterable[flags.FlagHolder], reads: Iterable[flags.FlagHolder]) -> None:
  """Raises ValueError where one of the flags `defined` was given that is not among those read."""
  read = {flag.name for flag in reads}
  for flag in defined:
    if flag.present and flag.name not in read:
      raise ValueError(f"--{flag.name} means nothing here: leave it out.")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
  """Bad input ends the program with its message and status 2, without a traceback.

  It is for set-up, where such errors are the user's to mend; a traceback from the middle of a run
  is kept.
  """
  try:
    yield
  except (
    flags.Error,
    ValueError,
    OSError,
    ImportError,
    LookupError,
    AttributeError,
    TypeError,
  ) as error:
    print(f"error: {_message(error)}", file=sys.stderr)
    sys.exit(2)


def _message(error: Exception) -> str:
  """Of the error, in one line."""
  while isinstance(error, (KeyError, AttributeError)) and error.args:
    if not isinstance(error.args[0], Exception):
      return " ".join(str(error.args[0]).split())  # str(KeyError) is a repr
    error = error.args[0]
  lines = str(error).strip().splitlines() or [type(error).__name__]
  if any(words in lines[0] for words in ("Configuration is not available", "Error whilst parsing")):
    lines = ["--config:", lines[-1]]  # of config_flags' long account only the cause
  return " ".join(" ".join(lines).split())


def required(flag: flags.FlagHolder) -> str:
  """The value of a flag that has no default.

  Raises:
    ValueError: it was not given.
  """
  if not flag.value:
    help_ = flags.FLAGS[flag.name].help
    raise ValueError(f"--{flag.name} is missing: give --{flag.name}=... ({help_})")
  return flag.value


def checkpoint() -> dict[str, Any]:
  """Which parameters the flags ask for: the arguments of `experiment.restore_params`.

  Raises:
    ValueError: --workdir is missing.
  """
  return {
    "config": CONFIG.value,
    "workdir": required(WORKDIR),
    "last": LAST.value,
    "step": STEP.value,
    "best": BEST.value,
    "average_std": AVERAGE_STD.value,
    "mesh": mesh(),
  }


def mesh() -> jax.sharding.Mesh:
  """The mesh of --mesh, all devices along "data" without it.

  Raises:
    ValueError: it is no mesh, or does not fill the devices.
  """
  sizes = {}
  for entry in (MESH.value or "").split(",") if MESH.value else ():
    axis, _, size = entry.partition("=")
    if axis not in partition.AXES or axis in sizes or not size.isdecimal():
      raise ValueError(
        f"--mesh={MESH.value} is no list of axis=devices: an axis is one of "
        f"{', '.join(partition.AXES)}."
      )
    sizes[axis] = int(size)
  return partition.make_mesh(**sizes)


def runs() -> list[tuple[str, ml_collections.ConfigDict]]:
  """Every run that --config, --seeds and --sweep stand for, with its workdir.

  A single run uses --workdir itself; several use a directory each below it, named by what differs,
  such as optimizer.peak=3e-3,seed=1.

  Raises:
    ValueError: a flag is missing or empty, or sweeps what the configuration does not have.
  """
  config, workdir = required(CONFIG), required(WORKDIR)
  axes = []
  for sweep in SWEEP.value:
    field, equals, values = sweep.partition("=")
    if not equals or not values:
      raise ValueError(f"--sweep={sweep} is not of the form field=value,value.")
    axes.append([(field, value) for value in values.split(",")])
  if SEEDS.value is not None:
    if not SEEDS.value:
      raise ValueError("--seeds is empty: give --seeds=0,1,2.")
    axes.append([("seed", value) for value in SEEDS.value])
  for (field, _), *_ in axes:
    values = [value for axis in axes for name, value in axis if name == field]
    if len(set(values)) < len(values):
      raise ValueError(f"{field} takes a value twice in --seeds or --sweep: {','.join(values)}.")
  if not axes:
    return [(workdir, config)]
  return [
    (
      f"{workdir}/{','.join(f'{field}={value}' for field, value in point)}",
      _override(config, point),
    )
    for point in itertools.product(*axes)
  ]


def _override(config, point) -> ml_collections.ConfigDict:
  """A copy with fields set from their text, read as the type that they have."""
  config = config.copy_and_resolve_references()
  for field, text in point:
    *path, name = field.split(".")
    parent = config
    for part in path:
      parent = parent.get(part) if isinstance(parent, ml_collections.ConfigDict) else None
    if not isinstance(parent, ml_collections.ConfigDict) or name not in parent:
      raise ValueError(f"A sweep over {field}: the configuration has no such field.")
    parent[name] = _parse(field, text, parent[name])
  return config.lock()


def _parse(field, text, old):
  kinds = {
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    int: int,
    float: float,
    str: str,
  }
  if type(old) not in kinds:
    raise ValueError(f"A sweep over {field}: only numbers, strings and booleans can be swept.")
  try:
    return kinds[type(old)](text)
  except (ValueError, KeyError):
    kind = type(old).__name__
    raise ValueError(f"A sweep over {field}: {text!r} is not of its type, {kind}.") from None
