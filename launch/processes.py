"""Several processes as one run, on JAX's own runtime: the flags, and starting it.

  python -m ancestral.launch.train ... --distributed                  # SLURM, a TPU pod, GKE, MPI
  python -m ancestral.launch.train ... --coordinator=host:1234 --num_processes=4 --process_id=0

Every process runs the same command, but for --process_id where it is given. The workdir is one
that all of them see.
"""

import jax
from absl import flags

_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "One of several processes, which SLURM, Open MPI, a TPU pod or GKE started."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, free there.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which this is, from 0.", lower_bound=0)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
  "heartbeat_timeout",
  100,
  "Seconds of silence after which a process counts as lost.",
  lower_bound=2,
)
_START_TIMEOUT = flags.DEFINE_integer(
  "start_timeout", 300, "Seconds that the processes wait for the last to come.", lower_bound=1
)
FLAGS = (
  _DISTRIBUTED,
  _COORDINATOR,
  _NUM_PROCESSES,
  _PROCESS_ID,
  _HEARTBEAT_TIMEOUT,
  _START_TIMEOUT,
)


def start() -> None:
  """Joins the other processes, before anything else is done with JAX; alone it does nothing.

  Raises:
    ValueError: flags are missing, or nothing says which processes there are.
  """
  given = {
    "--coordinator": _COORDINATOR.value,
    "--num_processes": _NUM_PROCESSES.value,
    "--process_id": _PROCESS_ID.value,
  }
  missing = [name for name, value in given.items() if value is None]
  if missing and len(missing) < len(given):
    raise ValueError(f"{', '.join(missing)} missing: the three are given together.")
  if missing and not _DISTRIBUTED.value:
    return
  if not missing and _PROCESS_ID.value >= _NUM_PROCESSES.value:
    raise ValueError(f"--process_id={_PROCESS_ID.value} is not below {_NUM_PROCESSES.value}.")
  jax.config.update("jax_cpu_collectives_implementation", "gloo")  # CPUs have no other
  try:
    jax.distributed.initialize(
      *given.values(),
      initialization_timeout=_START_TIMEOUT.value,
      heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT.value,
    )
  except ValueError as error:
    raise ValueError(
      f"--distributed: {error} Give --coordinator, --num_processes and --process_id."
    ) from None


def patience() -> float:
  """Seconds after which a lost process has been noticed by all."""
  return 2.0 * _HEARTBEAT_TIMEOUT.value
