"""Samples from a trained model, verified where its task can.

  python -m ancestral.launch.sample --workdir=runs/arithmetic --prompt=12+345= --num_samples=4
  python -m ancestral.launch.sample --workdir=runs/arithmetic --num_problems=5
  python -m ancestral.launch.sample --workdir=runs/text --prompt="def " --max_new_tokens=200

Prompts are continued as they are; --num_problems asks held-out problems instead, and says what the
verifier says. With --output, one JSON object a sample is written there.
"""

import functools
import json
from collections.abc import Sequence

import jax
import rich.console
import rich.markup
from absl import flags as absl_flags

from ..evaluation import attempts
from . import experiment as experiment_lib
from . import flags

_PROMPT = absl_flags.DEFINE_multi_string("prompt", [], "Text to continue; may be repeated.")
_NUM_PROBLEMS = absl_flags.DEFINE_integer("num_problems", 0, "Held-out problems to answer.")
_NUM_SAMPLES = absl_flags.DEFINE_integer("num_samples", 1, "Samples for each prompt.", lower_bound=1)
_TEMPERATURE = absl_flags.DEFINE_float("temperature", 1.0, "0 is greedy.", lower_bound=0.0)
_TOP_K = absl_flags.DEFINE_integer("top_k", None, "Keep the k likeliest tokens.", lower_bound=1)
_TOP_P = absl_flags.DEFINE_float("top_p", 1.0, "Keep the nucleus of this mass.", lower_bound=0.0,
                                 upper_bound=1.0)
_MAX_NEW_TOKENS = absl_flags.DEFINE_integer("max_new_tokens", None, "The configuration's if unset.",
                                            lower_bound=1)
_SEED = absl_flags.DEFINE_integer("seed", 0, "Of the draws.")
_LAST = absl_flags.DEFINE_bool("last", False, "Use the last parameters, not their average.")
_STEP = absl_flags.DEFINE_integer("step", None, "Checkpoint to take; the latest by default.")
_OUTPUT = absl_flags.DEFINE_string("output", None, "JSONL file for the samples.")


def _drawing(experiment, params) -> dict:
  """The arguments that `respond` and `attempt` share."""
  config = experiment.config.evaluation
  max_new_tokens = _MAX_NEW_TOKENS.value or config.max_new_tokens
  sample = experiment_lib.sampler(experiment, max_new_tokens=max_new_tokens, top_k=_TOP_K.value)
  settings = {"temperature": _TEMPERATURE.value, "top_p": _TOP_P.value}
  rows = max(len(_PROMPT.value), _NUM_PROBLEMS.value) * _NUM_SAMPLES.value
  return {"sample": functools.partial(sample, params, settings), "key": jax.random.key(_SEED.value),
          "num_samples": _NUM_SAMPLES.value, "batch_size": min(rows, config.batch_size),
          "max_length": experiment.model_config.max_length, "max_new_tokens": max_new_tokens}


def draw(experiment, params) -> list[dict]:
  """One record a sample."""
  drawing = _drawing(experiment, params)
  if not _NUM_PROBLEMS.value:
    responses = attempts.respond(tokenizer=experiment.tokenizer, texts=_PROMPT.value, **drawing)
    return [{"prompt": prompt, **response._asdict()}
            for prompt, row in zip(_PROMPT.value, responses, strict=True) for response in row]
  if experiment.task is None:
    raise ValueError("--num_problems needs a task, and this run's data are text: give --prompt.")
  per_level = -(-_NUM_PROBLEMS.value // len(experiment.config.task.levels))
  problems = experiment_lib.held_out_problems(experiment, per_level)[-_NUM_PROBLEMS.value:]
  made = attempts.attempt(task=experiment.task, problems=problems, **drawing)
  return [{"prompt": a.problem.prompt, "text": text, "correct": verdict.correct,
           "reason": verdict.reason}
          for a in made for text, verdict in zip(a.responses, a.verdicts, strict=True)]


def main(_: Sequence[str]) -> None:
  """Samples from the checkpoint of --workdir."""
  with flags.one_line_errors():
    workdir = flags.required(flags.WORKDIR)
    if bool(_PROMPT.value) == bool(_NUM_PROBLEMS.value):
      raise ValueError("Give either --prompt=TEXT or --num_problems=N.")
    config = flags.CONFIG.value or experiment_lib.load_config(workdir)
    experiment, params, step = experiment_lib.restore_params(
      config, workdir, last=_LAST.value, step=_STEP.value)
    records = draw(experiment, params)
  console = rich.console.Console(highlight=False)
  for record in records:
    verdict = ""
    if "correct" in record:
      verdict = " [green]correct[/]" if record["correct"] else f" [red]{record['reason']}[/]"
    prompt, text = rich.markup.escape(record["prompt"]), rich.markup.escape(record["text"])
    console.print(f"{prompt}[bold]{text}[/]{verdict}")
  if _OUTPUT.value:
    with open(_OUTPUT.value, "w") as file:
      file.writelines(json.dumps({"step": step, **record}) + "\n" for record in records)


if __name__ == "__main__":
  flags.run(main)
