"""Trains the model of a configuration, or goes on where an earlier call stopped.

  python -m ancestral.launch.train --config=configs/arithmetic.py --workdir=runs/arithmetic
  python -m ancestral.launch.train --config=configs/arithmetic.py:small --workdir=runs/small \\
      --config.optimizer.peak=1e-3 --seeds=0,1,2 --sweep=optimizer.name=adamw,muon

The same command resumes: parameters, optimiser, average, order of the data and randomness go on
exactly as if the run had not stopped. Ctrl-C or SIGTERM finishes the step and saves first.

WORKDIR gets checkpoints/, metrics.jsonl, speed.jsonl, TensorBoard event files and config.json; with
--profile, a trace of steps 10 to 13 in profile/. A step whose loss is not finite, or leaps (where
train.spike_factor is set), stops the run: its batch is in diverged/, the last checkpoint is good.
"""

import contextlib
import functools
import json
import os
import pathlib
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import jax

from ..training import averaging, checkpoint, data, guard, loop, metrics, monitor, sharding
from ..training import processes as processes_lib
from ..training import state as state_lib
from . import adapters, fields, flags, processes, workdirs
from . import experiment as experiment_lib

READS = (flags.CONFIG, flags.WORKDIR, flags.SEEDS, flags.SWEEP, flags.PROFILE, *processes.FLAGS)
# What may differ between a run and its resumption: how long it is, and what is kept of it.
FREE = (
  "train.num_steps",
  "train.log_every",
  "train.evaluate_every",
  "train.save_every",
  "train.keep",
  "train.spike_factor",
  "evaluation",
  *experiment_lib.HOW,
)


class Run(NamedTuple):
  """A run that is checked and ready, at its beginning or at its last good checkpoint."""

  experiment: experiment_lib.Experiment
  workdir: pathlib.Path
  key: jax.Array
  abstract: state_lib.TrainState  # shapes, and where the arrays are
  state: state_lib.TrainState
  batches: Iterator[Any]
  manager: checkpoint.Manager
  frozen: state_lib.Params | None  # those that adapters change; None where all are trained


def open_run(config: fields.Config, workdir: str) -> Run:
  """Builds what the configuration names and restores what the workdir holds.

  Raises:
    ValueError: the configuration is wrong in itself, or not that of the run in the workdir; nothing
      has been changed there.
  """
  experiment = experiment_lib.build(workdirs.resumed(config, workdir))
  init_key, key = jax.random.split(jax.random.key(config.seed))
  mesh = fields.mesh_of(experiment.config)
  abstract = experiment_lib.abstract_state(experiment, mesh)
  kind = experiment_lib.kind_of(experiment.config)
  process_index, process_count = kind.share(experiment.config, mesh)
  batches = data.batches(
    experiment.source,
    experiment.rows,
    batch_size=config.train.batch_size,
    seed=config.seed,
    process_index=process_index,
    process_count=process_count,
    prefetch=2,
  )
  frozen = None
  if adapters.used(experiment.config):
    frozen = experiment_lib.start_params(experiment.config, mesh)
    experiment = experiment._replace(config=adapters.identified(experiment.config, frozen))
  directory = workdirs.checkpoints(workdir)
  with contextlib.ExitStack() as undo:
    undo.callback(batches.close)
    manager = checkpoint.open_manager(directory, keep=config.train.keep, best=workdirs.quality)
    undo.callback(manager.close)
    if manager.latest_step() is None:
      state = experiment_lib.first_state(experiment, init_key, abstract)
    else:
      saved = adapters.compared(checkpoint.load_config(directory))
      current = adapters.compared(fields.to_json(experiment.config))
      checkpoint.check_config(saved, current, ignore=(*FREE, *kind.FREE_TO_RESUME))
      restored = checkpoint.restore(manager, abstract)
      if restored.step > config.train.num_steps:
        raise ValueError(
          f"{workdir} has made {restored.step} steps, more than config.train.num_steps="
          f"{config.train.num_steps}: raise it, or use a new workdir."
        )
      state = restored.state
      data.set_state(batches, restored.data_state)
    undo.pop_all()
  return Run(experiment, pathlib.Path(workdir), key, abstract, state, batches, manager, frozen)


def _writer(run: Run) -> metrics.Writer:
  """The first process writes, for people and for programs.

  What depends on the machine is apart, so that metrics.jsonl is that of a run that never stopped.
  """
  if jax.process_index():
    return metrics.chain()
  done = int(run.state.step)
  of_machine = lambda name: name.startswith(("speed/", "memory/", "seconds/"))
  jsonl = lambda name: metrics.jsonl(run.workdir / name, step=done)
  return metrics.chain(
    metrics.console(run.experiment.config.train.num_steps, step=done),
    metrics.only(lambda name: not of_machine(name), jsonl("metrics.jsonl")),
    metrics.only(of_machine, jsonl("speed.jsonl")),
    metrics.tensorboard(run.workdir, step=done),
  )


def _judge(config: fields.Config) -> guard.Judge:
  factor = config.train.get("spike_factor")
  return guard.finite if factor is None else guard.first_of(guard.finite, guard.spikes(factor))


def _stopwatch(run: Run, kind: experiment_lib.Kind) -> monitor.Stopwatch:
  mesh = sharding.mesh_of(run.abstract)
  _, shares = kind.share(run.experiment.config, mesh)
  flops = kind.flops and functools.partial(kind.flops, run.experiment, run.abstract, shares)
  return monitor.Stopwatch(flops=flops, devices=mesh.devices.ravel(), shares=shares)


@contextlib.contextmanager
def _stepping(run: Run, kind: experiment_lib.Kind, profile: bool) -> Iterator[Any]:
  """Within it, the (state, batch) -> (state, metrics) of the run."""
  mesh, done = sharding.mesh_of(run.abstract), int(run.state.step)
  read = lambda: experiment_lib.start_params(run.experiment.config, mesh)
  start = read if run.frozen is None else lambda: run.frozen
  with (
    jax.set_mesh(mesh),
    kind.stepping(run.experiment, run.abstract, run.workdir, done, start) as step,
    contextlib.ExitStack() as tracing,
  ):
    step = functools.partial(step, run.key)
    if profile:
      step = tracing.enter_context(monitor.profiled(step, run.workdir / "profile", done=done))
    yield step


def train(run: Run, *, profile: bool = False) -> state_lib.TrainState:
  """Trains to the end, and leaves everything in the workdir.

  Args:
    run: from `open_run`.
    profile: whether to write a trace of some steps.

  Raises:
    loop.Interrupted: by a signal, after saving.
    loop.Diverged: at a bad step, whose batch is kept.
  """
  experiment, c = run.experiment, run.experiment.config.train
  kind = experiment_lib.kind_of(experiment.config)
  config = fields.to_json(experiment.config)
  if jax.process_index() == 0:
    (run.workdir / "config.json").write_text(json.dumps(config, indent=1))
  merge = adapters.merging(experiment.config, run.frozen)
  writer, watch = _writer(run), _stopwatch(run, kind)
  scored: dict[int, dict[str, float]] = {}  # the last evaluation, for the checkpoint of its step

  def write(done, scalars):
    rate = float(experiment.schedule(done - 1))
    measured = watch.rates(scalars) | monitor.memory()
    writer.write(done, {**scalars, "learning_rate": rate, **measured})

  def evaluate(done, state):
    scored.clear()
    found = experiment.score(kind.finished(merge(averaging.used(state))))
    scored[done] = metrics.write_all(writer, done, found)

  def save(done, state):
    checkpoint.save(run.manager, done, state, data.get_state(run.batches), config, scored.get(done))

  try:
    with _stepping(run, kind, profile) as step:
      return loop.fit(
        run.state,
        watch.batches(run.batches),
        step,
        num_steps=c.num_steps,
        write=loop.Every(c.log_every, write),
        evaluate=loop.Every(c.evaluate_every, watch.aside(evaluate)),
        save=loop.Every(c.save_every, watch.aside(save)),
        progress=writer.tick,
        judge=_judge(experiment.config),
      )
  except loop.Diverged as bad:
    bad.add_note(f"Its batch is in {guard.save(run.workdir / 'diverged', bad)}.")
    raise
  finally:
    writer.close()
    run.manager.close()  # waits for what is being saved
    run.batches.close()


def interrupted(workdir: str, stop: loop.Interrupted | KeyboardInterrupt) -> NoReturn:
  """Ends the program as the signal would have, and says how to go on."""
  if isinstance(stop, KeyboardInterrupt):
    print(f"{workdir}: stopped. The same command goes on from what was saved.", file=sys.stderr)
    os._exit(128 + signal.SIGINT)  # without waiting for a compilation to end
  print(f"{workdir}: stopped by {stop}, and saved. The same command goes on.", file=sys.stderr)
  sys.exit(128 + signal.Signals[stop.signal])


def main(_: Sequence[str]) -> None:
  """Trains every run that the flags stand for, one after the other."""
  with flags.one_line_errors():
    processes.start()
    runs = flags.runs()
    for _, config in runs[1:]:  # a mistake in the last is not for the end of the first
      experiment_lib.build(config)
  num_diverged = 0  # the other runs of a sweep go on
  for workdir, config in runs:
    with flags.one_line_errors():
      run = open_run(config, workdir)
    print(
      f"{workdir}: from step {int(run.state.step)} to {config.train.num_steps}", file=sys.stderr
    )
    try:
      with processes_lib.together(workdir, timeout=processes.patience()):
        train(run, profile=flags.PROFILE.value)
    except (loop.Interrupted, KeyboardInterrupt) as stop:
      interrupted(workdir, stop)
    except loop.Diverged as bad:
      print(f"{workdir}: {bad} {' '.join(bad.__notes__)}", file=sys.stderr)
      num_diverged += 1
      continue
    print(
      f"{workdir}: done. Next: python -m ancestral.launch.evaluate --workdir={workdir}",
      file=sys.stderr,
    )
  sys.exit(1 if num_diverged else 0)


if __name__ == "__main__":
  flags.run(main, READS)
