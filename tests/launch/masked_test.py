"""Masked models through the binaries: trained, sampled, evaluated; bad input in one line."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.configs import masked_lm
from ancestral.evaluation import attempts, fillings
from ancestral.launch import (
  evaluate,
  experiment,
  export,
  fields,
  masked,
  plan,
  train,
  unmasking,
)
from ancestral.models import flat_safetensors
from ancestral.tasks import base as tasks
from ancestral.training import metrics


@pytest.mark.parametrize("variant", ["text", "blocks", "arithmetic", "sudoku4"])
def test_a_variant_is_trained_and_scored(masked_run, variant):
  records = metrics.read_jsonl(masked_run(variant) / "metrics.jsonl")
  scored = {name for record in records for name in record}
  assert {"loss", "accuracy"} <= scored
  assert ("pass@1" in scored) == (variant in ("arithmetic", "sudoku4"))
  assert ("held_out_loss" in scored) == (variant in ("text", "blocks"))


@pytest.mark.parametrize("variant", ["sudoku4-autoregressive", "text-autoregressive"])
def test_a_twin_has_the_same_size_and_tokens(variant, masked_arguments, masked_texts):
  config = masked_lm.get_config(variant)
  twin = masked_lm.get_config(variant.removesuffix("-autoregressive"))
  for made in (config, twin):
    if "task" not in made:
      made.data.folder, made.data.pattern = str(masked_texts), "*.txt"
  causal, bidirectional = (experiment.build(made) for made in (config, twin))
  assert causal.model_config.causal and not bidirectional.model_config.causal
  assert bidirectional.model_config.vocab_size == causal.model_config.vocab_size + 1
  for name in ("num_layers", "width", "num_heads", "positions"):
    assert getattr(causal.model_config, name) == getattr(bidirectional.model_config, name)
  assert config.train.to_dict() == twin.train.to_dict()


def test_a_run_goes_on_exactly(command, masked_arguments, tmp_path):
  """What comes after a checkpoint is made again as it was: of its last half, lost."""
  workdir, arguments = tmp_path / "run", masked_arguments("arithmetic")
  assert command(train, f"--workdir={workdir}", *arguments).status == 0
  read = lambda: [r["loss"] for r in metrics.read_jsonl(workdir / "metrics.jsonl") if "loss" in r]
  whole = read()
  shutil.rmtree(workdir / "checkpoints" / "4")
  outcome = command(train, f"--workdir={workdir}", *arguments)
  assert outcome.status == 0 and "from step 2 to 4" in outcome.err
  assert len(whole) == 4 and read() == whole


def test_evaluation_has_a_table_for_each_pattern(command, masked_run):
  workdir = masked_run("arithmetic")
  outcome = command(evaluate, f"--workdir={workdir}", "--sampler=ordered", "--order=entropy")
  assert outcome.status == 0, outcome.err
  result = json.loads((workdir / "evaluation.json").read_text())
  assert sorted(result["blanks"]) == ["anywhere", "operand", "result"]
  for name, found in result["blanks"].items():
    assert found["unmasking"]["order"] == "entropy"
    prompts = [attempt["prompt"] for attempt in found["attempts"]]
    assert all("_" in prompt for prompt in prompts)
    if name == "result":
      assert all(set(prompt.partition("=")[2]) == {"_"} for prompt in prompts)


def test_evaluation_of_text_is_a_bound(command, masked_run):
  outcome = command(evaluate, f"--workdir={masked_run('text')}")
  assert outcome.status == 0 and "Held-out loss <=" in outcome.out


def test_a_run_is_planned_and_exported(command, masked_run, masked_arguments, tmp_path):
  assert "parameters" in command(plan, *masked_arguments("sudoku4")).out

  def planned(variant, *flags):
    outcome = command(plan, *masked_arguments(variant), "--json", *flags)
    assert outcome.status == 0, outcome.err
    return json.loads(outcome.out)

  whole = planned("sudoku4")
  again = planned("sudoku4", "--config.model.remat=full")
  assert again["model_flops"] == whole["model_flops"] < whole["flops"] < again["flops"]
  assert whole["cache"] == 0 < planned("blocks")["cache"]
  halves = planned("sudoku4", "--config.mesh.tensor=2", "--devices=2")
  assert halves["held"]["params"] < whole["held"]["params"]
  output = tmp_path / "exported"
  workdir = f"--workdir={masked_run('sudoku4')}"
  outcome = command(export, workdir, f"--output={output}")
  assert outcome.status == 2 and "--layout=flat" in outcome.err
  assert command(export, workdir, f"--output={output}", "--layout=flat").status == 0
  named, _ = flat_safetensors.read(output / "model.safetensors")
  assert "embedding" in named


BAD_FIELDS = {
  "loss.masking=often": "config.loss.masking is 'often'; it is one of count, time.",
  "loss.schedule=steep": "config.loss.schedule is 'steep'; it is one of",
  "loss.block_length=5": "config.loss.block_length is 5: evaluation.unmasking.block has to be",
  "evaluation.unmasking.order=up": "config.evaluation.unmasking.order is 'up'; it is one of",
  "evaluation.unmasking.per_step=0": "config.evaluation.unmasking.per_step is 0; it is at least 1.",
  "evaluation.unmasking.remask=2.0": "remask is 2.0; it is from 0 to 1.",
  "task.blanks=('middle',)": "config.task.blanks is 'middle'; it is one of",
  "data.row_length=8": "config.data.row_length is 8: problems take up to",
  "evaluation.temperature=-1.0": "config.evaluation.temperature is -1.0; it is at least 0.",
  "evaluation.unmasking.threshold=0.5": "order has to be one of max_probability, margin",
  "evaluation.unmasking.entropy_bound=-1.0": "entropy_bound is -1.0; it is at least 0.",
  "evaluation.unmasking.guidance=-1.0": "guidance is -1.0; it is at least 0.",
  "evaluation.unmasking.order=margin": "order means nothing to the sampler first_hitting",
  "evaluation.unmasking.steps=3": "steps means nothing to the sampler first_hitting",
  "evaluation.unmasking.guidance=2.0": "has never seen a masked prompt: train it with loss.uncond",
  "loss.unconditional=1.0": "config.loss.unconditional is 1.0; it is from 0 to less than 1.",
}


@pytest.mark.parametrize("change", BAD_FIELDS)
def test_bad_fields_are_said_in_one_line(command, masked_arguments, tmp_path, change):
  outcome = command(
    train, f"--workdir={tmp_path / 'run'}", *masked_arguments("arithmetic"), f"--config.{change}"
  )
  assert outcome.status == 2 and BAD_FIELDS[change] in outcome.err
  assert len(outcome.err.strip().splitlines()) == 1


def test_a_share_of_prompts_is_masked_as_the_configuration_says():
  losses = []
  for share in (0.0, 0.9):
    config = masked_lm.get_config("sudoku4")
    config.loss.unconditional = share
    built = experiment.build(config)
    batch = {
      "tokens": jnp.ones((8, 35), jnp.int32),
      "mask": jnp.arange(35)[None] >= jnp.full((8, 1), 18),
    }
    loss = jax.jit(built.loss_fn)(jax.random.key(0), built.init_params(jax.random.key(1)), batch)
    losses.append(float(loss[0][0].sum()))
  assert abs(losses[0] - losses[1]) > 1e-3


def test_passages_have_a_length(command, masked_arguments, tmp_path):
  arguments = [
    f"--workdir={tmp_path / 'run'}",
    *masked_arguments("text"),
    "--config.data.passage=0",
  ]
  outcome = command(train, *arguments)
  assert outcome.status == 2 and "config.data.passage is 0; it is at least 1." in outcome.err


def test_a_bound_needs_no_sampler(command, masked_run):
  outcome = command(evaluate, f"--workdir={masked_run('text')}", "--sampler=ancestral")
  assert outcome.status == 2 and "--sampler means nothing here" in outcome.err


def test_a_row_of_one_long_block_is_sampled_while_training(command, masked_arguments, tmp_path):
  changes = {"loss__block_length": 160, "evaluation__unmasking__block": 160}
  arguments = masked_arguments("blocks", **changes, train__batch_size=2)
  arguments += ["--config.data.row_length=160", "--config.train.num_steps=1"]
  assert command(train, f"--workdir={tmp_path / 'run'}", *arguments).status == 0


def test_a_right_filling_is_judged_right():
  """The queries of problems and what is read of them, with a filler that knows the answers."""
  for variant in ("arithmetic", "sudoku4"):
    config = masked_lm.get_config(variant)
    config.evaluation.num_problems = 5
    built = experiment.build(config)
    problems = masked.held_out_problems(built, 5)
    queries = [masked.query(built, problem.prompt) for problem in problems]
    code = built.tokenizer
    right = []
    for problem, query in zip(problems, queries, strict=True):
      tail = [*code.encode(problem.answer), code.eos]
      tokens = np.full(len(query.tokens), code.pad)
      tokens[: query.start] = query.tokens[: query.start]
      tokens[query.start : query.start + len(tail)] = tail
      given = query.tokens != built.mask
      np.testing.assert_array_equal(tokens[given], query.tokens[given])
      right.append(tokens)
    responses = [
      [fillings.response(code, tokens, query.start)]
      for tokens, query in zip(right, queries, strict=True)
    ]
    verify_all = attempts.in_process(built.task.verify)
    judged = attempts.judge_all(built.task, problems, responses, verify_all)
    assert all(attempt.num_correct == 1 for attempt in judged)


def test_what_is_blank_is_learned_and_the_rest_is_given():
  built = experiment.build(masked_lm.get_config("arithmetic"))
  side = tasks.restrict(built.task, "train", test_percent=built.config.task.test_percent)
  code = built.tokenizer
  for index in range(20):
    problem, example = tasks.problem_at(side, built.config.seed, index), built.source[index]
    assert code.decode(example["tokens"].tolist()) == problem.answer
    shown = np.where(example["mask"], built.mask, example["tokens"])
    query = masked.query(built, problem.prompt)
    np.testing.assert_array_equal(shown, query.tokens[: len(shown)])
  texts = experiment.build(masked_lm.get_config("sudoku4"))
  example = texts.source[0]
  assert example["mask"].sum() == 17 and not example["mask"][:18].any()  # the answer and its end


def test_the_section_of_a_configuration_has_the_fields_of_the_flags():
  assert sorted(unmasking.section()) == sorted(flag.name for flag in unmasking.FLAGS)


def test_a_section_says_no_more_than_its_sampler_reads():
  config = masked_lm.get_config("text")
  section = lambda **settings: fields.Config({**unmasking.section(), **settings})
  unmasking.check(section(), config)
  confident = {"sampler": "ordered", "order": "max_probability"}
  unmasking.check(section(**confident, threshold=0.9), config)
  for settings, said in (
    ({**confident, "threshold": 90.0}, "scores from 0 to 1"),
    ({**confident, "threshold": 0.9, "per_step": 4}, "per_step means nothing beside threshold"),
    ({**confident, "entropy_bound": 0.1}, "order means nothing beside entropy_bound"),
    ({"sampler": "ordered", "remask": 0.5}, "remask means nothing to the sampler ordered"),
    ({"sampler": "ancestral", "block": 4}, "block means nothing to the sampler ancestral"),
  ):
    with pytest.raises(ValueError, match=said):
      unmasking.check(section(**settings), config)
