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
  sample,
  train,
  unmasking,
)
from ancestral.models import flat_safetensors
from ancestral.sampling import base, logits
from ancestral.tasks import base as tasks
from ancestral.training import metrics


@pytest.fixture(scope="session")
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp("texts")
  for i in range(20):
    (folder / f"{i}.txt").write_text(f"the number {i} comes after {i - 1} " * 8)
  return folder


@pytest.fixture
def of_variant(tiny, source):
  """Arguments of a run of a variant that takes seconds."""

  def arguments(variant, **changes):
    settings = {"model__num_layers": 1, **changes}
    if not variant.startswith(("arithmetic", "sudoku")):
      settings |= {"data__folder": source, "data__pattern": "*.txt", "data__row_length": 32}
    return tiny(f"masked_lm.py:{variant}", **settings)

  return arguments


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
  return tmp_path_factory.mktemp("masked")


@pytest.fixture
def run_of(command, of_variant, runs):
  """The workdir of a trained run of a variant, made once."""

  def workdir(variant):
    path = runs / variant
    if not path.exists():
      outcome = command(train, f"--workdir={path}", *of_variant(variant))
      assert outcome.status == 0, outcome.err
    return path

  return workdir


@pytest.mark.parametrize("variant", ["text", "blocks", "arithmetic", "sudoku4"])
def test_a_variant_is_trained_and_scored(run_of, variant):
  records = metrics.read_jsonl(run_of(variant) / "metrics.jsonl")
  scored = {name for record in records for name in record}
  assert {"loss", "accuracy"} <= scored
  assert ("pass@1" in scored) == (variant in ("arithmetic", "sudoku4"))
  assert ("held_out_loss" in scored) == (variant in ("text", "blocks"))


@pytest.mark.parametrize("variant", ["sudoku4-autoregressive", "text-autoregressive"])
def test_a_twin_has_the_same_size_and_tokens(variant, of_variant, source):
  config = masked_lm.get_config(variant)
  twin = masked_lm.get_config(variant.removesuffix("-autoregressive"))
  for made in (config, twin):
    if "task" not in made:
      made.data.folder, made.data.pattern = str(source), "*.txt"
  causal, bidirectional = (experiment.build(made) for made in (config, twin))
  assert causal.model_config.causal and not bidirectional.model_config.causal
  assert bidirectional.model_config.vocab_size == causal.model_config.vocab_size + 1
  for name in ("num_layers", "width", "num_heads", "positions"):
    assert getattr(causal.model_config, name) == getattr(bidirectional.model_config, name)
  assert config.train.to_dict() == twin.train.to_dict()


def test_a_run_goes_on_exactly(command, of_variant, tmp_path):
  """What comes after a checkpoint is made again as it was: of its last half, lost."""
  workdir, arguments = tmp_path / "run", of_variant("arithmetic")
  assert command(train, f"--workdir={workdir}", *arguments).status == 0
  read = lambda: [r["loss"] for r in metrics.read_jsonl(workdir / "metrics.jsonl") if "loss" in r]
  whole = read()
  shutil.rmtree(workdir / "checkpoints" / "4")
  outcome = command(train, f"--workdir={workdir}", *arguments)
  assert outcome.status == 0 and "from step 2 to 4" in outcome.err
  assert len(whole) == 4 and read() == whole


SAMPLERS = [
  [],
  ["--sampler=ordered", "--order=margin"],
  ["--sampler=ordered", "--entropy_bound=0.5"],
  ["--sampler=ordered", "--order=max_probability", "--threshold=0.3"],
  ["--sampler=ordered", "--per_step=3", "--block=4"],
  ["--sampler=ancestral", "--steps=4"],
  ["--sampler=remasking", "--steps=4", "--remask=0.2"],
  ["--sampler=ordered", "--order=margin", "--guidance=2"],
]


@pytest.mark.parametrize("how", SAMPLERS, ids=lambda how: " ".join(how) or "config")
def test_blanks_are_filled_in_by_every_sampler(command, run_of, tmp_path, how):
  output = tmp_path / "out.jsonl"
  outcome = command(
    sample,
    f"--workdir={run_of('arithmetic')}",
    "--prompt=1_+3_=94",
    "--num_samples=3",
    f"--output={output}",
    *how,
  )
  assert outcome.status == 0, outcome.err
  lines = [json.loads(line) for line in output.read_text().splitlines()]
  assert [line["index"] for line in lines] == [0, 1, 2]
  for line in lines:
    # What is given stays: [bos] 1 _ + 3 _ = 9 4 [eos], and padding.
    again = lines[0]["tokens"]
    kept = [i for i in range(len(again)) if i not in (2, 5)]
    assert [line["tokens"][i] for i in kept] == [again[i] for i in kept]
    assert 1 <= line["calls"] <= 4


def test_a_sample_does_not_depend_on_the_batch_and_an_output_goes_on(command, run_of, tmp_path):
  common = [f"--workdir={run_of('arithmetic')}", "--prompt=__+3=_4", "--num_samples=5"]
  whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
  assert command(sample, *common, f"--output={whole}", "--batch_size=5").status == 0
  part.write_text("".join(whole.read_text().splitlines(True)[:2]))
  outcome = command(sample, *common, f"--output={part}", "--batch_size=2", "--resume")
  assert outcome.status == 0, outcome.err
  assert part.read_text() == whole.read_text()


def test_problems_are_verified(command, run_of):
  how = ["--sampler=ordered", "--order=margin"]
  outcome = command(sample, f"--workdir={run_of('sudoku4')}", "--num_problems=3", *how)
  assert outcome.status == 0, outcome.err
  lines = outcome.out.splitlines()
  assert len(lines) == 3
  assert all("wrong length" in x or "clue" in x or "duplicate" in x or "format" in x for x in lines)


def test_texts_are_continued_and_filled_in(command, run_of, tmp_path):
  def drawn(*flags):
    output = tmp_path / "out.jsonl"
    output.unlink(missing_ok=True)
    outcome = command(sample, f"--workdir={run_of('text')}", f"--output={output}", *flags)
    assert outcome.status == 0, outcome.err
    return json.loads(output.read_text())

  continued = drawn("--prompt=the", "--length=16")
  assert len(continued["tokens"]) == 16 and continued["calls"] == 13
  filled = drawn("--prompt=the n___er", "--blank=_")
  assert len(filled["tokens"]) == 10 and filled["calls"] == 3
  again = drawn("--prompt=the n***er", "--blank=*")
  assert again["tokens"] == filled["tokens"]
  nothing = drawn("--prompt=", "--length=8")
  assert len(nothing["tokens"]) == 8
  assert filled["stop_reason"] == "filled" and filled["text"].startswith("the n")
  how = ["--sampler=ordered", "--order=max_probability", "--threshold=0.9"]
  cool = drawn("--prompt=the", "--length=16", "--temperature=0", *how)
  # The threshold is of the model's own probabilities, far from sure after four steps.
  assert cool["settings"]["temperature"] == 0 and cool["calls"] == 13


def test_an_output_of_another_length_is_not_gone_on_with(command, run_of, tmp_path):
  output = tmp_path / "out.jsonl"
  common = [f"--workdir={run_of('text')}", "--prompt=the", f"--output={output}"]
  assert command(sample, *common, "--length=8").status == 0
  outcome = command(sample, *common, "--length=9", "--resume")
  assert outcome.status == 2 and "length 8 where this command would have 9" in outcome.err


def test_what_is_filled_in_is_shown_alone(command, run_of):
  outcome = command(sample, f"--workdir={run_of('arithmetic')}", "--prompt=1_+33=94")
  assert outcome.status == 0 and len(outcome.out.strip()) <= 8 and "(cut)" not in outcome.out


def test_a_model_of_blocks_is_sampled_in_blocks(command, run_of, tmp_path):
  output = tmp_path / "out.jsonl"
  outcome = command(
    sample, f"--workdir={run_of('blocks')}", "--prompt=the", "--length=32", f"--output={output}"
  )
  assert outcome.status == 0, outcome.err
  line = json.loads(output.read_text())
  assert len(line["tokens"]) == 32 and line["calls"] == 29 + 1  # the first block is cached once


def test_evaluation_has_a_table_for_each_pattern(command, run_of):
  workdir = run_of("arithmetic")
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


def test_evaluation_of_text_is_a_bound(command, run_of):
  outcome = command(evaluate, f"--workdir={run_of('text')}")
  assert outcome.status == 0 and "Held-out loss <=" in outcome.out


def test_a_run_is_planned_and_exported(command, run_of, of_variant, tmp_path):
  assert "parameters" in command(plan, *of_variant("sudoku4")).out
  output = tmp_path / "exported"
  workdir = f"--workdir={run_of('sudoku4')}"
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
  "loss.unconditional=1.0": "config.loss.unconditional is 1.0; it is from 0 to less than 1.",
}


@pytest.mark.parametrize("change", BAD_FIELDS)
def test_bad_fields_are_said_in_one_line(command, of_variant, tmp_path, change):
  outcome = command(
    train, f"--workdir={tmp_path / 'run'}", *of_variant("arithmetic"), f"--config.{change}"
  )
  assert outcome.status == 2 and BAD_FIELDS[change] in outcome.err
  assert len(outcome.err.strip().splitlines()) == 1


BAD_FLAGS = {
  "--prompt=a --blank=__": "has to be one character",
  "--prompt=a_*b --blank=*": "takes --blank=_",
  "--prompt=abcdef --length=4": "The prompt takes 6 tokens of 4",
  "--num_problems=2": "--num_problems needs a task",
  "--prompt=a --block=2 --sampler=ancestral": "--block means nothing to the sampler ancestral",
  "--prompt=a --sampler=ordered --order=margin --threshold=0.5 --entropy_bound=1": "nothing beside",
  "--prompt=a --sampler=ordered --threshold=0.5": "order has to be one of max_probability",
  "--prompt=a --order=margin": "--order means nothing to the sampler first_hitting",
  "--prompt=a --steps=3": "--steps means nothing to the sampler first_hitting",
  "--prompt=a --sampler=ordered --remask=0.1": "--sampler=remasking.",
  "--prompt=a --sampler=ordered --per_step=2 --entropy_bound=1": "nothing beside entropy_bound",
  "--prompt=a --blank=*": "--blank=* is not in the prompt",
  "--prompt=a*b --blank=* --length=9": "--length is of continuations",
  "--prompt=a --mirostat=2 --preset=llamacpp": "no order of tokens",
  "--prompt=a --no_repeat_ngram_size=2": "may not look at those written before",
  "--prompt=a --min_new_tokens=4": "may not look at those written before",
  "--prompt=a --prompts=b.txt": "Give either",
}


@pytest.mark.parametrize("given", BAD_FLAGS)
def test_bad_flags_are_said_in_one_line(command, run_of, given):
  outcome = command(sample, f"--workdir={run_of('text')}", *given.split(" "))
  assert outcome.status == 2 and BAD_FLAGS[given] in outcome.err, outcome.err
  assert len(outcome.err.strip().splitlines()) == 1


BAD_RUNS = {
  ("blocks", "--prompt=the --length=20"): "blocks of 16 tokens, and 20 are not whole blocks",
  ("blocks", "--prompt=the --block=4"): "config.loss.block_length is 16",
  ("blocks", "--prompt=the --sampler=ancestral"): "sampler first_hitting or ordered",
  ("blocks", "--prompt=the --guidance=2"): "guidance is not for models of blocks",
  ("arithmetic", "--prompt=12+30="): "has no blank (_) to be filled in",
  ("arithmetic", "--prompt=1_+3=4 --length=9"): "--length is of continuations",
  ("sudoku4", "--prompt=1.3..41..14...2.= --length=50"): "longer than the model's 35",
}


@pytest.mark.parametrize("variant, given", BAD_RUNS, ids=str)
def test_what_a_run_cannot_do_is_said_in_one_line(command, run_of, variant, given):
  outcome = command(sample, f"--workdir={run_of(variant)}", *given.split(" "))
  assert outcome.status == 2 and BAD_RUNS[variant, given] in outcome.err, outcome.err
  assert len(outcome.err.strip().splitlines()) == 1


def test_lines_of_json_have_a_prompt_alone(command, run_of, tmp_path):
  prompts = tmp_path / "prompts.jsonl"
  prompts.write_text('{"prompt": "the"}\n{"prompt": "the", "seed": 3}\n')
  outcome = command(sample, f"--workdir={run_of('text')}", f"--prompts={prompts}")
  assert outcome.status == 2 and "a prompt, and nothing else" in outcome.err


def test_a_bound_needs_no_sampler(command, run_of):
  outcome = command(evaluate, f"--workdir={run_of('text')}", "--sampler=ancestral")
  assert outcome.status == 2 and "--sampler means nothing here" in outcome.err


def test_a_row_of_one_long_block_is_sampled_while_training(command, of_variant, tmp_path):
  changes = {"loss__block_length": 160, "evaluation__unmasking__block": 160}
  arguments = of_variant("blocks", **changes, train__batch_size=2)
  arguments += ["--config.data.row_length=160", "--config.train.num_steps=1"]
  assert command(train, f"--workdir={tmp_path / 'run'}", *arguments).status == 0


def test_guidance_of_0_does_not_see_the_prompt_and_that_of_1_is_none():
  built = experiment.build(masked_lm.get_config("sudoku4"))
  params = masked.finished(built.init_params(jax.random.key(0)))
  params = jax.tree.map(lambda leaf: 3 * leaf, params)  # so that what is given matters
  keys = base.row_keys(jax.random.key(1), jnp.arange(2))
  given = np.full((2, 35), built.mask)
  given[:, :18] = np.random.default_rng(0).integers(0, built.mask, (2, 18))
  other = np.where(np.arange(35) < 18, 1, given)

  def written(guidance, tokens):
    c = fields.Config({**unmasking.section(), "guidance": guidance})
    filled = masked.filler(built, logits.temperature, c)(params, 1.0, keys, jnp.asarray(tokens))
    assert np.all(filled.calls == (17 if guidance == 1 else 34))
    return np.asarray(filled.tokens)

  np.testing.assert_array_equal(written(0.0, given)[:, 18:], written(0.0, other)[:, 18:])
  assert np.any(written(1.0, given)[:, 18:] != written(1.0, other)[:, 18:])
  np.testing.assert_array_equal(written(1.0, given), written(1.0 + 1e-6, given))


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
  unmasking.check(fields.Config(unmasking.section()))
