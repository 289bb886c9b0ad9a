"""Right answers by the order in which masks are filled in, beside left-to-right decoding.

  T="python -m ancestral.launch.train"; C=configs/masked_lm.py
  $T --config=$C:sudoku4 --workdir=runs/sudoku
  $T --config=$C:sudoku4-autoregressive --workdir=runs/sudoku_causal
  $T --config=$C:arithmetic --workdir=runs/sums
  $T --config=$C:arithmetic-autoregressive --workdir=runs/sums_causal
  python -m ancestral.benchmarks.unmasking_orders --sudoku=runs/sudoku,runs/sudoku_causal \\
      --sums=runs/sums,runs/sums_causal

The networks have the same size and saw the same tokens. Greedy, and at temperature 1; shares of
held-out problems with their 95% intervals, and calls of the network a problem. Hidden operands and
blanks anywhere are what the causal model cannot be asked.
"""

from collections.abc import Sequence

import jax
import ml_collections
import numpy as np
from absl import app, flags

from ancestral.evaluation import attempts, coverage, fillings
from ancestral.launch import experiment as experiment_lib
from ancestral.launch import language, masked, unmasking
from ancestral.sampling import logits
from ancestral.tasks import base as tasks
from ancestral.tasks import blanks

_SUDOKU = flags.DEFINE_list("sudoku", None, "Workdirs: masked, causal.", required=True)
_SUMS = flags.DEFINE_list("sums", None, "Workdirs: masked, causal.", required=True)
_PROBLEMS = flags.DEFINE_integer("problems", 200, "Of each level.")

ORDERS = {
  "first hitting (random)": {"sampler": "first_hitting"},
  "left to right": {"sampler": "ordered", "order": "left_to_right"},
  "max probability": {"sampler": "ordered", "order": "max_probability"},
  "margin": {"sampler": "ordered", "order": "margin"},
  "entropy": {"sampler": "ordered", "order": "entropy"},
  "sampled token": {"sampler": "ordered", "order": "sampled_probability"},
  "random, 4 a call": {"sampler": "ordered", "per_step": 4},
  "margin, 4 a call": {"sampler": "ordered", "order": "margin", "per_step": 4},
  "entropy bound .1": {"sampler": "ordered", "entropy_bound": 0.1},
  "threshold .9": {"sampler": "ordered", "order": "max_probability", "threshold": 0.9},
  "ancestral, 4 steps": {"sampler": "ancestral", "steps": 4},
  "ancestral, 64 steps": {"sampler": "ancestral", "steps": 64},
  "remasking, 64 steps": {"sampler": "remasking", "steps": 64, "remask": 0.05},
}


def share(right: Sequence[bool]) -> str:
  """A mean, with its 95% interval by Wilson."""
  low, high = coverage.wilson_interval(sum(right), len(right))
  return f"{np.mean(right):.3f} ({low:.3f} to {high:.3f})"


def filled(experiment: masked.Experiment, params, problems, temperature: float, **settings):
  """(whether each problem is solved, calls a problem), one sample each."""
  chosen = ml_collections.ConfigDict({**unmasking.section(), **settings})
  fill = masked.filler(experiment, logits.temperature, chosen)
  queries = [masked.query(experiment, problem.prompt) for problem in problems]
  made = fillings.fill_all(
    lambda keys, tokens: fill(params, temperature, keys, tokens),
    queries,
    jax.random.key(0),
    num_samples=1,
    batch_size=min(256, len(problems)),
  )
  responses = [
    [fillings.response(experiment.tokenizer, tokens, query.start)]
    for tokens, query in zip(made.tokens, queries, strict=True)
  ]
  verify_all = attempts.in_process(experiment.task.verify)
  judged = attempts.judge_all(experiment.task, problems, responses, verify_all)
  return [attempt.num_correct == 1 for attempt in judged], float(np.mean(made.calls))


def decoded(experiment: language.Experiment, params, problems, temperature: float) -> list[bool]:
  """Whether the causal model solves each problem."""
  c = experiment.config.evaluation
  sample = language.sampler(experiment, max_new_tokens=c.max_new_tokens)
  made = attempts.attempt(
    lambda keys, prompts: sample(params, temperature, keys, prompts),
    experiment.task,
    problems,
    jax.random.key(0),
    num_samples=1,
    batch_size=min(256, len(problems)),
    max_length=experiment.model_config.max_length,
    max_new_tokens=c.max_new_tokens,
  )
  return [attempt.num_correct == 1 for attempt in made]


def hidden(problems: Sequence[tasks.Problem], pattern: str) -> list[tasks.Problem]:
  """The same problems, with blanks."""
  hide, rng = blanks.PATTERNS[pattern](), np.random.default_rng(0)
  return [blanks.ask(problem, hide(rng, problem)) for problem in problems]


def table(title: str, experiment: masked.Experiment, params, problems, causal, asked) -> None:
  """Prints a table of all orders; of the causal model too, where there is what it can be asked."""
  print(f"\n{title}, {len(problems)} held-out problems\n")
  print("| order | greedy | calls | temperature 1 | calls |\n|---|---|---|---|---|")
  if asked:
    greedy, drawn = (share(decoded(*causal, asked, t)) for t in (0.0, 1.0))
    print(f"| causal | {greedy} | | {drawn} | |", flush=True)
  for name, settings in ORDERS.items():
    made = [filled(experiment, params, problems, t, **settings) for t in (0.0, 1.0)]
    cells = " | ".join(f"{share(right)} | {calls:.1f}" for right, calls in made)
    print(f"| {name} | {cells} |", flush=True)


def main(_: Sequence[str]) -> None:
  """Prints the tables."""
  sudoku, causal = (experiment_lib.restore_params(None, run)[:2] for run in _SUDOKU.value)
  problems = language.held_out_problems(causal[0], _PROBLEMS.value)
  table("Sudoku 4 by 4", *sudoku, problems, causal, problems)
  sums, causal = (experiment_lib.restore_params(None, run)[:2] for run in _SUMS.value)
  problems = language.held_out_problems(causal[0], _PROBLEMS.value)
  for pattern in sums[0].config.task.blanks:
    asked = problems if pattern == "result" else []
    table(f"Sums, blanks: {pattern}", *sums, hidden(problems, pattern), causal, asked)


if __name__ == "__main__":
  app.run(main)
