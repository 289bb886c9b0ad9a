"""Samples from a trained model, verified where its task can.

  python -m ancestral.launch.sample --workdir=runs/arithmetic --prompt=12+345= --num_samples=4
  python -m ancestral.launch.sample --workdir=runs/arithmetic --num_problems=5
  python -m ancestral.launch.sample --workdir=runs/text --prompt="def " --max_new_tokens=200

Prompts are continued as they are; --num_problems asks held-out problems instead, and says what the
verifier says. With --output, one JSON object a sample is written there.
"""

import functools
import json
import pathlib
from collections.abc import Sequence

import jax
import rich.console
import rich.text
from absl import flags as absl_flags

from ..evaluation import attempts
from . import experiment as experiment_lib
from . import flags

READS = (flags.CONFIG, flags.WORKDIR, flags.LAST, flags.STEP, flags.BEST)
_PROMPT = absl_flags.DEFINE_multi_string("prompt", [], "Text to continue; may be repeated.")
_NUM_PROBLEMS = absl_flags.DEFINE_integer(
  "num_problems", 0, "Held-out problems to answer.", lower_bound=0
)
_NUM_SAMPLES = absl_flags.DEFINE_integer(
  "num_samples", 1, "Samples for each prompt.", lower_bound=1
)
_TEMPERATURE = absl_flags.DEFINE_float("temperature", 1.0, "0 is greedy.", lower_bound=0.0)
_TOP_K = absl_flags.DEFINE_integer("top_k", None, "Keep the k likeliest tokens.", lower_bound=1)
_TOP_P = absl_flags.DEFINE_float(
  "top_p", 1.0, "Keep the nucleus of this mass.", lower_bound=0.0, upper_bound=1.0
)
_MAX_NEW_TOKENS = absl_flags.DEFINE_integer(
  "max_new_tokens", None, "The configuration's if unset.", lower_bound=1
)
_SEED = absl_flags.DEFINE_integer("seed", 0, "Of the draws.")
_OUTPUT = absl_flags.DEFINE_string("output", None, "JSONL file for the samples.")


def _drawing(experiment, params) -> dict:
  """The arguments that `respond` and `attempt` share."""
  config = experiment.config.evaluation
  max_new_tokens = _MAX_NEW_TOKENS.value or config.max_new_tokens
  sample = experiment_lib.sampler(experiment, max_new_tokens=max_new_tokens, top_k=_TOP_K.value)
  settings = {"temperature": _TEMPERATURE.value, "top_p": _TOP_P.value}
  rows = max(len(_PROMPT.value), _NUM_PROBLEMS.value) * _NUM_SAMPLES.value
  return {
    "sample": functools.partial(sample, params, settings),
    "key": jax.random.key(_SEED.value),
    "num_samples": _NUM_SAMPLES.value,
    "batch_size": min(rows, config.batch_size),
    "max_length": experiment.model_config.max_length,
    "max_new_tokens": max_new_tokens,
  }


def draw(experiment, params) -> list[dict]:
  """One record a sample."""
  drawing = _drawing(experiment, params)
  if not _NUM_PROBLEMS.value:
    responses = attempts.respond(tokenizer=experiment.tokenizer, texts=_PROMPT.value, **drawing)
    return [
      {"prompt": prompt, **response._asdict()}
      for prompt, row in zip(_PROMPT.value, responses, strict=True)
      for response in row
    ]
  if experiment.task is None:
    raise ValueError("--num_problems needs a task, and this run's data are text: give --prompt.")
  per_level = -(-_NUM_PROBLEMS.value // len(experiment.config.task.levels))
  problems = experiment_lib.held_out_problems(experiment, per_level)[-_NUM_PROBLEMS.value :]
  made = attempts.attempt(task=experiment.task, problems=problems, **drawing)
  return [
    {"prompt": a.problem.prompt, "text": text, "correct": verdict.correct, "reason": verdict.reason}
    for a in made
    for text, verdict in zip(a.responses, a.verdicts, strict=True)
  ]


def main(_: Sequence[str]) -> None:
  """Samples from the checkpoint of --workdir."""
  with flags.one_line_errors():
    wanted = flags.checkpoint()
    if bool(_PROMPT.value) == bool(_NUM_PROBLEMS.value):
      raise ValueError("Give either --prompt=TEXT or --num_problems=N.")
    if _OUTPUT.value and not pathlib.Path(_OUTPUT.value).parent.is_dir():
      raise FileNotFoundError(f"--output={_OUTPUT.value}: there is no such directory, make it.")
    experiment, params, step = experiment_lib.restore_params(**wanted)
    records = draw(experiment, params)
  console = rich.console.Console(highlight=False, emoji=False)
  for record in records:
    line = rich.text.Text(record["prompt"]).append(record["text"], "bold")
    if "correct" in record:
      reason, colour = ("correct", "green") if record["correct"] else (record["reason"], "red")
      line.append(f"  {reason}", colour)
    elif record["fault"]:
      line.append(f"  ({record['fault']})", "dim")
    console.print(line, soft_wrap=True)
  if _OUTPUT.value:
    with open(_OUTPUT.value, "w") as file:
      file.writelines(json.dumps({"step": step, **record}) + "\n" for record in records)


if __name__ == "__main__":
  flags.run(main, READS)
