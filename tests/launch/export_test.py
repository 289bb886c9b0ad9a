"""Runs as directories that other libraries load: what is in them, and what is refused."""

import json
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.configs import arithmetic, image_classifier, image_diffusion, text
from ancestral.launch import experiment, export, fields, sample, train
from ancestral.models import diffusers_layout, dit, flat_safetensors, pretrained, unet
from ancestral.tasks import tokenizer as tokenizers

CONFIGS = pathlib.Path(arithmetic.__file__).parent
SMALL = {"num_layers": 2, "width": 16, "num_heads": 2}
PEERS = pytest.mark.peers


@pytest.fixture(scope="session")
def rotary_folder(tmp_path_factory):
  return tmp_path_factory.mktemp("rotary") / "run"


@pytest.fixture
def rotary(command, tiny, rotary_folder):
  """A run of sums whose model transformers has, made once."""
  if not rotary_folder.exists():
    outcome = command(train, f"--workdir={rotary_folder}", *tiny(model__positions="rotary"))
    assert outcome.status == 0, outcome.err
  return rotary_folder


def built(config, **model):
  """An experiment of a small model and untrained parameters, laid out for use."""
  with config.unlocked():
    config.model.update(model)
  made = experiment.build(config)
  params = jax.jit(made.init_params)(jax.random.key(0))
  return made, experiment.kind_of(config).finished(params)


def of_bytes(**model):
  config = text.get_config()
  with config.unlocked():
    config.data.pattern = "b*.py"
    config.data.row_length = 63
    config.evaluation.max_new_tokens = 20
  return built(config, **SMALL, **model)


def drawn(command, path, *arguments):
  asked = ["--num_samples=4", "--temperature=0.8", f"--output={path}"]
  outcome = command(sample, *arguments, *asked)
  assert outcome.status == 0, outcome.err
  records = map(json.loads, path.read_text().splitlines())
  return sorted(records, key=lambda record: record["index"])


def test_an_exported_run_draws_what_the_run_draws(command, rotary, tmp_path):
  folder = tmp_path / "exported"
  outcome = command(export, f"--workdir={rotary}", f"--output={folder}")
  assert outcome.status == 0 and f"Step 4, as transformers: {folder}" in outcome.err
  assert {path.name for path in folder.iterdir()} == {
    *("config.json", "generation_config.json", "model.safetensors", "ancestral.json"),
    *("tokenizer.json", "tokenizer_config.json"),
  }
  made, params, step = experiment.restore_params(None, str(rotary))
  config, found = pretrained.read(folder)
  jax.tree.map(np.testing.assert_array_equal, found, params)
  assert config.max_length == made.model_config.max_length and step == 4
  origin = json.loads((folder / "ancestral.json").read_text())
  assert origin == {"step": 4, "config": fields.to_json(made.config)}
  asked = ["--prompt=1+1=", "--prompt=12+345="]
  runs = drawn(command, tmp_path / "run", f"--workdir={rotary}", *asked)
  exported = drawn(command, tmp_path / "exported.jsonl", f"--pretrained={folder}", *asked)
  assert len(runs) == 8 and len({record["text"] for record in runs}) > 2
  for ours, theirs in zip(runs, exported, strict=True):
    same = {"prompt", "text", "tokens", "stop_reason", "seed", "max_new_tokens"}
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    np.testing.assert_allclose(theirs["log_prob"], ours["log_prob"], atol=1e-5)


def test_the_checkpoint_asked_for_is_exported(command, rotary, tmp_path):
  folder, last = tmp_path / "exported", tmp_path / "last"
  asked = [f"--workdir={rotary}", "--step=2", "--dtype=bfloat16"]
  assert command(export, *asked, f"--output={folder}").status == 0
  assert command(export, f"--workdir={rotary}", "--last", f"--output={last}").status == 0
  _, params, _ = experiment.restore_params(None, str(rotary), step=2)
  config, found = pretrained.read(folder)
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  jax.tree.map(np.testing.assert_array_equal, found, rounded)
  assert config.dtype == "bfloat16" and found["embedding"].dtype == jnp.bfloat16
  _, params, _ = experiment.restore_params(None, str(rotary), last=True)
  jax.tree.map(np.testing.assert_array_equal, pretrained.read(last)[1], params)


def test_an_output_that_is_not_empty_is_left_alone(command, snapshot, rotary, tmp_path):
  (tmp_path / "there").mkdir()
  outcome = command(export, f"--workdir={rotary}", f"--output={tmp_path / 'there'}")
  assert outcome.status == 0  # empty
  before = snapshot(tmp_path)
  for workdir in (rotary, tmp_path / "none"):  # before anything else is looked at
    outcome = command(export, f"--workdir={workdir}", f"--output={tmp_path / 'there'}")
    assert outcome.status == 2 and "there is something in it; name a new" in outcome.err
  file = tmp_path / "there" / "config.json"
  assert command(export, f"--workdir={rotary}", f"--output={file}").status == 2
  assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--layout=diffusers"], "not for a language run: there is transformers, peft, flat"),
    (["--layout=peft"], "--layout=peft"),
    (["--layout=onnx"], "--layout=onnx"),
    (["--dtype=float8"], "--dtype=float8"),
    (["--step=3"], "3"),
    (["--chat"], "--chat means nothing here"),
    (["--seed=1"], "--seed means nothing here"),
  ],
)
def test_what_cannot_be_exported_is_said_in_one_line(command, rotary, tmp_path, flags, words):
  outcome = command(export, f"--workdir={rotary}", f"--output={tmp_path / 'new'}", *flags)
  assert outcome.status == 2 and words in outcome.err and outcome.err.count("\n") == 1
  assert not any(tmp_path.iterdir())


def test_a_model_without_a_counterpart_goes_by_its_own_names(command, trained, tmp_path):
  """Learned positions between RMS norms are in no family of transformers."""
  folder = tmp_path / "new"
  outcome = command(export, f"--workdir={trained}", f"--output={folder}")
  assert outcome.status == 2 and "no counterpart of positions" in outcome.err
  assert "--layout=flat" in outcome.err and not any(tmp_path.iterdir())
  asked = [f"--workdir={trained}", f"--output={folder}", "--layout=flat"]
  assert command(export, *asked).status == 0
  made, params, _ = experiment.restore_params(None, str(trained))
  tensors, record = flat_safetensors.read(folder / "model.safetensors")
  assert record == {"config": fields.to_json(made.config)}
  kernel = tensors["layers"]["0"]["attention"]["query"]["kernel"]
  np.testing.assert_array_equal(kernel, params["layers"][0]["attention"]["query"]["kernel"])
  layers = {**tensors, "layers": tuple(tensors["layers"][str(i)] for i in range(1))}
  jax.tree.map(np.testing.assert_array_equal, layers, params)
  assert tokenizers.pretrained(folder).opened("1+2=") == made.tokenizer.opened("1+2=")


def test_nothing_is_left_of_an_export_that_fails(tmp_path, monkeypatch):
  made, params = of_bytes()

  def fails(folder, *rest):
    (folder / "half").write_text("")
    raise KeyboardInterrupt

  monkeypatch.setitem(export.LAYOUTS, "flat", fails)
  with pytest.raises(KeyboardInterrupt):
    export.export(tmp_path / "new", "flat", made, params, 0, None)
  assert not any(tmp_path.iterdir())


def digits(variant, **model):
  return built(image_diffusion.get_config(variant), **model)


NETWORKS = {
  "digits": (SMALL, dit.DiTConfig),
  "digits_unet": ({"channels": 8, "num_groups": 4, "head_dim": 4}, unet.UNetConfig),
}


@pytest.mark.parametrize("name", ["digits", pytest.param("digits_unet", marks=pytest.mark.slow)])
def test_images_go_to_diffusers(tmp_path, name):
  made, params = digits(name, **NETWORKS[name][0])
  for dtype in (None, "bfloat16"):
    folder = tmp_path / str(dtype)
    export.export(folder, "diffusers", made, params, 7, dtype)
    found, config = diffusers_layout.load(folder)
    assert isinstance(config, NETWORKS[name][1])
    expected = jax.tree.map(lambda x, d=dtype: x.astype(d or x.dtype), params["network"])
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    origin = json.loads((folder / "ancestral.json").read_text())
    assert origin["step"] == 7 and origin["config"]["diffusion"]["head"]


def test_a_network_that_diffusers_has_not_is_refused(tmp_path):
  made, params = digits("digits", num_registers=2)
  with pytest.raises(ValueError, match=r"num_registers=0, not 2\. --layout=flat writes it"):
    export.export(tmp_path / "new", "diffusers", made, params, 0, None)
  assert not any(tmp_path.iterdir())


def test_points_and_classifiers_go_by_their_own_names(tmp_path):
  made, params = digits("points")
  with pytest.raises(ValueError, match=r"diffusers has no network of points.*--layout=flat"):
    export.export(tmp_path / "points", "diffusers", made, params, 0, None)
  export.export(tmp_path / "points", "flat", made, params, 0, "bfloat16")
  tensors, _ = flat_safetensors.read(tmp_path / "points" / "model.safetensors")
  expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  jax.tree.map(np.testing.assert_array_equal, tensors, expected)
  config = image_classifier.get_config()
  with pytest.raises(ValueError, match=r"A classifier has no counterpart.*--layout=flat"):
    export.layout_of(config, None)
  assert export.layout_of(config, "flat") == "flat"
  made, params = built(config)
  export.export(tmp_path / "classifier", "flat", made, params, 0, None)
  tensors, _ = flat_safetensors.read(tmp_path / "classifier" / "model.safetensors")
  jax.tree.map(np.testing.assert_array_equal, tensors, params)


@pytest.fixture
def auto():
  """transformers' classes that load by the files alone."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what torch and transformers import
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM, transformers.AutoTokenizer


def compare(auto, folder, made, params, texts):
  """transformers has the same ids and logits, and goes on with the same tokens."""
  import torch

  model, tokenizer = (of.from_pretrained(folder) for of in auto)
  for given in texts:
    ids = made.tokenizer.opened(given)
    assert tokenizer(given)["input_ids"] == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == given
    with torch.inference_mode():
      theirs = model(torch.tensor([ids])).logits[0].numpy()
    with jax.default_matmul_precision("highest"):
      hidden, _ = made.model.trunk(params, made.model.embed(params, jnp.array([ids])))
      ours = made.model.readout(params, hidden)[0]
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)
    drawn = model.generate(torch.tensor([ids]), do_sample=False)[0].tolist()
    assert len(drawn) <= len(ids) + made.config.evaluation.max_new_tokens
    assert drawn[len(ids)] == int(ours[-1].argmax())
  ends = (model.generation_config.eos_token_id, model.generation_config.pad_token_id)
  assert ends == (made.tokenizer.eos, made.tokenizer.pad)


@PEERS
def test_transformers_loads_a_run(command, auto, rotary, tmp_path):
  folder = tmp_path / "exported"
  assert command(export, f"--workdir={rotary}", f"--output={folder}").status == 0
  made, params, _ = experiment.restore_params(None, str(rotary))
  compare(auto, folder, made, params, ["1+1=", "12+3=", ""])


@PEERS
@pytest.mark.parametrize("model", [{}, {"qk_norm": True}, {"num_kv_heads": 1, "window": 8}])
def test_transformers_loads_texts_of_bytes(auto, tmp_path, model):
  made, params = of_bytes(**model)
  export.export(tmp_path / "new", "transformers", made, params, 0, None)
  compare(auto, tmp_path / "new", made, params, ["def f(x):\n", "ünï <s>", ""])


@PEERS
def test_torch_reads_the_flat_layout(tmp_path):
  torch = pytest.importorskip("safetensors.torch")
  made, params = of_bytes(positions="learned")
  export.export(tmp_path / "new", "flat", made, params, 0, "bfloat16")
  found = torch.load_file(tmp_path / "new" / "model.safetensors")
  kernel = params["layers"][1]["mlp"]["up"]["kernel"].astype(jnp.bfloat16)
  read = found["layers/1/mlp/up/kernel"].float().numpy()
  np.testing.assert_array_equal(read, np.asarray(kernel, np.float32))


@pytest.mark.slow
def test_learning_and_preference_runs_are_exported(command, rotary, tmp_path):
  pairs = tmp_path / "pairs.jsonl"
  pairs.write_text(
    "".join(
      json.dumps({"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(9 - a - b)}) + "\n"
      for a in range(3)
      for b in range(3)
    )
  )
  steps = {"num_steps": 2, "batch_size": 4, "save_every": 2, "evaluate_every": 2}
  evaluation = {"num_problems": 3, "num_samples": 2, "batch_size": 8}
  common = [f"--config.start.workdir={rotary}"]
  common += [f"--config.train.{name}={value}" for name, value in steps.items()]
  common += [f"--config.evaluation.{name}={value}" for name, value in evaluation.items()]
  for name, more in {
    "policy.py": ["--config.rollouts.group_size=2", "--config.rollouts.num_workers=1"],
    "preference.py:file": [f"--config.data.path={pairs}"],
  }.items():
    run, folder = tmp_path / name, tmp_path / f"{name}.exported"
    config = [f"--config={CONFIGS / name}", *common, *more]
    outcome = command(train, f"--workdir={run}", *config)
    assert outcome.status == 0, outcome.err
    assert command(export, f"--workdir={run}", f"--output={folder}").status == 0
    asked = ["--prompt=1+1="]
    ours = drawn(command, tmp_path / f"{name}.jsonl", f"--workdir={run}", *asked)
    theirs = drawn(command, tmp_path / f"{name}.2.jsonl", f"--pretrained={folder}", *asked)
    assert [record["tokens"] for record in theirs] == [record["tokens"] for record in ours]
