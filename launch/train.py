"""Trains the model of a configuration, or goes on where an earlier call stopped.

  python -m ancestral.launch.train --config=configs/arithmetic.py --workdir=runs/arithmetic
  python -m ancestral.launch.train --config=configs/arithmetic.py:small --workdir=runs/small \\
      --config.optimizer.peak=1e-3 --seeds=0,1,2 --sweep=optimizer.name=adamw,muon

The same command resumes: parameters, optimiser, average, order of the data and randomness go on
exactly as if the run had not stopped. Ctrl-C or SIGTERM finishes the step and saves first.

WORKDIR gets checkpoints/, metrics.jsonl, TensorBoard event files and config.json.
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

from ..training import averaging, checkpoint, data, loop, metrics
from ..training import state as state_lib
from . import experiment as experiment_lib
from . import fields, flags, workdirs

READS = (flags.CONFIG, flags.WORKDIR, flags.SEEDS, flags.SWEEP)
# What may differ between a run and its resumption: how long it is, and what is kept of it.
FREE = (
  "train.num_steps",
  "train.log_every",
  "train.evaluate_every",
  "train.save_every",
  "train.keep",
  "evaluation",
)


class Run(NamedTuple):
  """A run that is checked and ready, at its beginning or at its last good checkpoint."""

  experiment: experiment_lib.Experiment
  workdir: pathlib.Path
  key: jax.Array
  state: state_lib.TrainState
  batches: Iterator[Any]
  manager: checkpoint.Manager


def open_run(config: fields.Config, workdir: str) -> Run:
  """Builds what the configuration names and restores what the workdir holds.

  Raises:
    ValueError: the configuration is wrong in itself, or not that of the run in the workdir; nothing
      has been changed there.
  """
  experiment = experiment_lib.build(workdirs.resumed(config, workdir))
  init_key, key = jax.random.split(jax.random.key(config.seed))
  init = functools.partial(experiment_lib.init_state, experiment)
  batches = data.batches(
    experiment.source,
    experiment.rows,
    batch_size=config.train.batch_size,
    seed=config.seed,
    prefetch=2,
  )
  directory = workdirs.checkpoints(workdir)
  with contextlib.ExitStack() as undo:
    undo.callback(batches.close)
    manager = checkpoint.open_manager(directory, keep=config.train.keep, best=workdirs.quality)
    undo.callback(manager.close)
    if manager.latest_step() is None:
      state = experiment_lib.first_state(experiment, init_key)
    else:
      saved = checkpoint.load_config(directory)
      kind = experiment_lib.kind_of(experiment.config)
      checkpoint.check_config(
        saved, fields.to_json(experiment.config), ignore=(*FREE, *kind.FREE_TO_RESUME)
      )
      restored = checkpoint.restore(manager, jax.eval_shape(init, init_key))
      if restored.step > config.train.num_steps:
        raise ValueError(
          f"{workdir} has made {restored.step} steps, more than config.train.num_steps="
          f"{config.train.num_steps}: raise it, or use a new workdir."
        )
      state = restored.state
      data.set_state(batches, restored.data_state)
    undo.pop_all()
  return Run(experiment, pathlib.Path(workdir), key, state, batches, manager)


def _writer(run: Run) -> metrics.Writer:
  """The first process writes, for people and for programs."""
  if jax.process_index():
    return metrics.chain()
  done = int(run.state.step)
  return metrics.chain(
    metrics.console(run.experiment.config.train.num_steps, step=done),
    metrics.jsonl(run.workdir / "metrics.jsonl", step=done),
    metrics.tensorboard(run.workdir, step=done),
  )


def train(run: Run) -> state_lib.TrainState:
  """Trains to the end, and leaves everything in the workdir.

  Raises:
    loop.Interrupted: by a signal, after saving.
  """
  experiment, c = run.experiment, run.experiment.config.train
  kind = experiment_lib.kind_of(experiment.config)
  config = fields.to_json(experiment.config)
  if jax.process_index() == 0:
    (run.workdir / "config.json").write_text(json.dumps(config, indent=1))
  writer = _writer(run)
  scored: dict[int, dict[str, float]] = {}  # the last evaluation, for the checkpoint of its step

  def write(done, scalars):
    writer.write(done, {**scalars, "learning_rate": float(experiment.schedule(done - 1))})

  def evaluate(done, state):
    scored.clear()
    scored[done] = experiment.score(kind.finished(averaging.used(state)))
    writer.write(done, scored[done])

  def save(done, state):
    checkpoint.save(run.manager, done, state, data.get_state(run.batches), config, scored.get(done))

  try:
    start = lambda: experiment_lib.start_params(experiment.config)
    with kind.stepping(experiment, run.workdir, int(run.state.step), start) as train_step:
      return loop.fit(
        run.state,
        run.batches,
        functools.partial(train_step, run.key),
        num_steps=c.num_steps,
        write=loop.Every(c.log_every, write),
        evaluate=loop.Every(c.evaluate_every, evaluate),
        save=loop.Every(c.save_every, save),
        progress=writer.tick,
      )
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
    runs = flags.runs()
    for _, config in runs[1:]:  # a mistake in the last is not for the end of the first
      experiment_lib.build(config)
  for workdir, config in runs:
    with flags.one_line_errors():
      run = open_run(config, workdir)
    print(
      f"{workdir}: from step {int(run.state.step)} to {config.train.num_steps}", file=sys.stderr
    )
    try:
      train(run)
    except (loop.Interrupted, KeyboardInterrupt) as stop:
      interrupted(workdir, stop)
    print(
      f"{workdir}: done. Next: python -m ancestral.launch.evaluate --workdir={workdir}",
      file=sys.stderr,
    )


if __name__ == "__main__":
  flags.run(main, READS)
