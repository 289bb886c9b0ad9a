"""Masked models asked from the command line: prompts, blanks, samplers, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.configs import masked_lm
from ancestral.launch import experiment, fields, masked, sample, unmasking, workdirs
from ancestral.launch import fillings as fillings_launch
from ancestral.sampling import base, logits
from ancestral.tasks import tokenizer

# Flags, and the calls of the network that two blanks take with them, least and most.
SAMPLERS = {
  "": (2, 2),
  "--sampler=ordered --order=margin": (2, 2),
  "--sampler=ordered --per_step=2": (1, 1),
  "--sampler=ordered --per_step=2 --block=4": (2, 2),
  "--sampler=ordered --entropy_bound=0.01": (2, 2),
  "--sampler=ordered --entropy_bound=20": (1, 1),
  "--sampler=ordered --order=max_probability --threshold=0": (1, 1),
  "--sampler=ancestral --steps=1": (1, 1),
  "--sampler=ancestral --steps=500": (2, 2),
  "--sampler=remasking --steps=30 --remask=0": (1, 2),
  "--sampler=remasking --steps=30 --remask=1": (4, 30),
  "--sampler=ordered --order=margin --guidance=2": (4, 4),
}


@pytest.mark.parametrize("how", SAMPLERS, ids=lambda how: how or "config")
def test_blanks_are_filled_in_by_every_sampler(command, masked_run, tmp_path, how):
  output, workdir = tmp_path / "out.jsonl", masked_run("arithmetic")
  flags = [f"--workdir={workdir}", "--prompt=1_+3_=94", "--num_samples=3", f"--output={output}"]
  outcome = command(sample, *flags, *how.split())
  assert outcome.status == 0, outcome.err
  built = experiment.build(workdirs.saved_config(str(workdir)))
  asked = masked.query(built, "1_+3_=94").tokens
  lines = [json.loads(line) for line in output.read_text().splitlines()]
  assert [line["index"] for line in lines] == [0, 1, 2]
  least, most = SAMPLERS[how]
  for line in lines:
    tokens = np.array(line["tokens"])
    np.testing.assert_array_equal(np.where(asked == built.mask, asked, tokens), asked)
    assert not np.any(tokens == built.mask) and np.sum(asked == built.mask) == 2
    assert least <= line["calls"] <= most


def test_a_sample_does_not_depend_on_the_batch_and_an_output_goes_on(command, masked_run, tmp_path):
  common = [f"--workdir={masked_run('arithmetic')}", "--prompt=__+3=_4", "--num_samples=5"]
  whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
  assert command(sample, *common, f"--output={whole}", "--batch_size=5").status == 0
  part.write_text("".join(whole.read_text().splitlines(True)[:2]))
  outcome = command(sample, *common, f"--output={part}", "--batch_size=2", "--resume")
  assert outcome.status == 0, outcome.err
  assert part.read_text() == whole.read_text()
  record = json.loads(whole.read_text().splitlines()[0])
  part.write_text(json.dumps({**record, "params": "0"}) + "\n")
  outcome = command(sample, *common, f"--output={part}", "--resume")
  assert outcome.status == 2 and "params" in outcome.err


def test_problems_are_verified(command, masked_run):
  how = ["--sampler=ordered", "--order=margin"]
  outcome = command(sample, f"--workdir={masked_run('sudoku4')}", "--num_problems=3", *how)
  assert outcome.status == 0, outcome.err
  lines = outcome.out.splitlines()
  assert len(lines) == 3
  assert all("wrong length" in x or "clue" in x or "duplicate" in x or "format" in x for x in lines)


def test_texts_are_continued_and_filled_in(command, masked_run, tmp_path):
  def drawn(*flags):
    output = tmp_path / "out.jsonl"
    output.unlink(missing_ok=True)
    outcome = command(sample, f"--workdir={masked_run('text')}", f"--output={output}", *flags)
    assert outcome.status == 0, outcome.err
    return json.loads(output.read_text())

  code = tokenizer.bytes_level()
  continued = drawn("--prompt=the", "--length=16")
  assert len(continued["tokens"]) == 16 and continued["calls"] == 13
  filled = drawn("--prompt=the n___er", "--blank=_")
  assert len(filled["tokens"]) == 10 and filled["calls"] == 3
  again = drawn("--prompt=the n***er", "--blank=*")
  assert again["tokens"] == filled["tokens"]
  nothing = drawn("--prompt=", "--length=8")
  assert len(nothing["tokens"]) == 8
  assert filled["stop_reason"] == "filled"
  assert filled["tokens"][:5] == code.encode("the n") and filled["tokens"][8:] == code.encode("er")
  underscored = drawn("--prompt=a_b = **", "--blank=*")
  assert underscored["tokens"][:6] == code.encode("a_b = ") and underscored["calls"] == 2
  how = ["--sampler=ordered", "--order=max_probability", "--threshold=0.9"]
  cool = drawn("--prompt=the", "--length=16", "--temperature=0", *how)
  # The threshold is of the model's own probabilities, far from sure after four steps.
  assert cool["settings"]["temperature"] == 0 and cool["calls"] == 13


def test_an_output_of_another_length_is_not_gone_on_with(command, masked_run, tmp_path):
  output = tmp_path / "out.jsonl"
  common = [f"--workdir={masked_run('text')}", "--prompt=the", f"--output={output}"]
  assert command(sample, *common, "--length=8").status == 0
  outcome = command(sample, *common, "--length=9", "--resume")
  assert outcome.status == 2 and "length 8 where this command would have 9" in outcome.err


def test_what_is_filled_in_is_shown_alone(command, masked_run):
  outcome = command(sample, f"--workdir={masked_run('arithmetic')}", "--prompt=1_+33=94")
  assert outcome.status == 0 and len(outcome.out.strip()) <= 8 and "(cut)" not in outcome.out


def test_a_model_of_blocks_is_sampled_in_blocks(command, masked_run, tmp_path):
  output = tmp_path / "out.jsonl"
  outcome = command(
    sample, f"--workdir={masked_run('blocks')}", "--prompt=the", "--length=32", f"--output={output}"
  )
  assert outcome.status == 0, outcome.err
  line = json.loads(output.read_text())
  assert len(line["tokens"]) == 32 and line["calls"] == 29 + 1  # the first block is cached once


BAD_FLAGS = {
  "--prompt=a --blank=__": "has to be one character",
  "--prompt=abcdef --length=4": "The prompt takes 6 tokens of 4",
  "--num_problems=2": "--num_problems needs a task",
  "--prompt=a --block=2 --sampler=ancestral": "--block means nothing to the sampler ancestral",
  "--prompt=a --sampler=ordered --order=margin --threshold=0.5 --entropy_bound=1": "give one",
  "--prompt=a --sampler=ordered --threshold=0.5": "order has to be one of max_probability",
  "--prompt=a --order=margin": "--order means nothing to the sampler first_hitting",
  "--prompt=a --steps=3": "--steps means nothing to the sampler first_hitting",
  "--prompt=a --sampler=ordered --remask=0.1": "sampler=remasking reads it.",
  "--prompt=a --sampler=ordered --per_step=2 --entropy_bound=1": "nothing beside entropy_bound",
  "--prompt=a --blank=*": "--blank=* is not in the prompt",
  "--prompt=a*b --blank=* --length=9": "--length is of continuations",
  "--prompt=a --mirostat=2 --preset=llamacpp": "no order of tokens",
  "--prompt=a --no_repeat_ngram_size=2": "may not look at those written before",
  "--prompt=a --min_new_tokens=4": "may not look at those written before",
  "--prompt=a --prompts=b.txt": "Give either",
}


@pytest.mark.parametrize("given", BAD_FLAGS)
def test_bad_flags_are_said_in_one_line(command, masked_run, given):
  outcome = command(sample, f"--workdir={masked_run('text')}", *given.split(" "))
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
def test_what_a_run_cannot_do_is_said_in_one_line(command, masked_run, variant, given):
  outcome = command(sample, f"--workdir={masked_run(variant)}", *given.split(" "))
  assert outcome.status == 2 and BAD_RUNS[variant, given] in outcome.err, outcome.err
  assert len(outcome.err.strip().splitlines()) == 1


def test_lines_of_json_have_a_prompt_alone(command, masked_run, tmp_path):
  prompts = tmp_path / "prompts.jsonl"
  prompts.write_text('{"prompt": "the"}\n{"prompt": "the", "seed": 3}\n')
  outcome = command(sample, f"--workdir={masked_run('text')}", f"--prompts={prompts}")
  assert outcome.status == 2 and "a prompt, and nothing else" in outcome.err


def test_an_answer_with_padding_in_it_has_ended():
  built = experiment.build(masked_lm.get_config("sudoku4"))
  query, code = masked.query(built, "1.3..41..14...2.="), built.tokenizer
  tokens = np.where(query.tokens == built.mask, code.pad, query.tokens)
  ask = fillings_launch.Ask(query, {}, None, False)
  reason = lambda: fillings_launch._record(built, ask, tokens, 1)["stop_reason"]
  assert reason() == "length"
  tokens[-1] = code.eos
  assert reason() == "stop"


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
