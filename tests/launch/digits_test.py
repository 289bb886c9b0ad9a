"""Runs of images by the binaries: trained, resumed, drawn, measured; and what they refuse."""

import gzip
import json
import math
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from ancestral.configs import image_classifier, image_diffusion
from ancestral.launch import (
  distances,
  evaluate,
  experiment,
  fields,
  images,
  pixels,
  sample,
  solver_search,
  solving,
  train,
  workdirs,
)
from ancestral.sampling import tables
from ancestral.training import averaging, checkpoint, metrics

CONFIG = pathlib.Path(image_diffusion.__file__)
TINY = {
  "model.num_layers": 1,
  "model.width": 16,
  "model.num_heads": 2,
  "model.dropout": 0.1,
  "train.num_steps": 6,
  "train.batch_size": 8,
  "train.save_every": 2,
  "train.log_every": 1,
  "train.evaluate_every": 6,
  "evaluation.batch_size": 16,
  "evaluation.num_images": 20,
  "evaluation.evaluations": 4,
}


def arguments(workdir, variant="digits", **more):
  chosen = {**TINY, **{name.replace("__", "."): value for name, value in more.items()}}
  if variant in ("points", "digits_unet"):
    chosen = {k: v for k, v in chosen.items() if k not in ("model.num_layers", "model.num_heads")}
  if variant == "digits_unet":
    del chosen["model.width"]
  overrides = [f"--config.{name}={value}" for name, value in chosen.items()]
  return [f"--workdir={workdir}", f"--config={CONFIG}:{variant}", *overrides]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("digits") / "run"


@pytest.fixture
def run(command, folder, monkeypatch):
  """A workdir with a tiny run, made once; classifiers are trained for a few steps."""
  recipe = image_classifier.get_config()
  with recipe.unlocked():
    recipe.train.update(num_steps=4, batch_size=16)
  monkeypatch.setattr(image_classifier, "get_config", lambda: recipe)
  if not folder.exists():
    outcome = command(train, *arguments(folder))
    assert outcome.status == 0, outcome.err
  return folder


def leaves(workdir, step):
  """Every leaf of a checkpoint as bytes, the data's position, and the metrics file."""
  directory = workdirs.checkpoints(workdir)
  made = experiment.build(fields.Config(checkpoint.load_config(directory, step)).lock())
  shape = jax.eval_shape(lambda key: experiment.init_state(made, key), jax.random.key(0))
  with checkpoint.open_manager(directory, create=False) as manager:
    restored = checkpoint.restore(manager, shape, step)
  values = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(restored.state)]
  return values, restored.data_state, metrics.read_jsonl(workdir / "metrics.jsonl")


def resumed(command, whole, broken, made):
  """A copy of a whole run loses its newest checkpoint, and goes on."""
  shutil.copytree(whole, broken)
  shutil.rmtree(broken / "checkpoints" / "6")
  outcome = command(train, *made(broken))
  assert outcome.status == 0 and "from step 4 to 6" in outcome.err
  assert leaves(broken, 6) == leaves(whole, 6)


def test_a_run_that_lost_its_newest_checkpoint_ends_as_one_that_did_not(command, run, tmp_path):
  resumed(command, run, tmp_path / "broken", arguments)


@pytest.mark.slow
def test_so_does_a_unet_with_a_learned_weighting_and_noisy_data(command, tmp_path):
  more = {
    "model__channels": 8,
    "model__head_dim": 8,
    "diffusion__learned_weighting": True,
    "diffusion__clean_share": 0.5,
    "diffusion__data_noise": 0.3,
  }
  made = lambda workdir: arguments(workdir, "digits_unet", **more)
  assert command(train, *made(tmp_path / "whole")).status == 0
  resumed(command, tmp_path / "whole", tmp_path / "broken", made)


def test_pictures_have_the_size_of_their_grid(command, run):
  outcome = command(sample, f"--workdir={run}", "--num_images=5", "--evaluations=3")
  assert outcome.status == 0 and "5 images, 3 evaluations each" in outcome.err
  with Image.open(run / "samples.png") as picture:
    assert picture.size == ((3 * 9 - 1) * 8, (2 * 9 - 1) * 8)  # cells of 8 and a line, times 8


def test_an_image_depends_on_seed_index_and_label_alone(command, run, tmp_path):
  drawn = {}
  for name, flags in {
    "all": ["--num_images=18"],
    "few": ["--num_images=3"],
    "seed": ["--num_images=3", "--seed=1"],
  }.items():
    output = tmp_path / f"{name}.npz"
    outcome = command(sample, f"--workdir={run}", f"--output={output}", *flags)
    assert outcome.status == 0, outcome.err
    drawn[name] = np.load(output)
  assert drawn["all"]["images"].shape == (18, 8, 8, 1)
  np.testing.assert_array_equal(drawn["all"]["labels"], np.arange(18) % 10)
  difference = drawn["all"]["images"][:3].astype(int) - drawn["few"]["images"]
  assert np.abs(difference).max() <= 1  # rounding to a byte may fall to either side
  assert np.any(drawn["seed"]["images"] != drawn["few"]["images"])


def test_classes_by_number_and_name_and_the_way_to_an_image(command, run, tmp_path):
  output = tmp_path / "way.npz"
  flags = ["--labels=3,5", "--num_images=2", "--trajectory", "--solver=heun", "--guidance=2"]
  flags.append("--evaluations=8")
  outcome = command(sample, f"--workdir={run}", f"--output={output}", *flags)
  assert (
    outcome.status == 0 and "7 evaluations each" in outcome.err
  )  # steps of two, the last of one
  way = np.load(output)
  np.testing.assert_array_equal(np.unique(way["labels"]), [3, 5])
  assert len(way["images"]) == 2 * (7 + 1)


def test_a_table_in_a_file_is_a_solver(command, run, tmp_path):
  made, _, _ = experiment.restore_params(None, run)
  table = solving.table(made.noising, made.config.evaluation, solver="ddim", evaluations=3)
  path = tmp_path / "solver.json"
  path.write_text(tables.to_json(table))
  outputs = []
  for name in ("ddim", str(path)):
    outputs.append(tmp_path / f"{len(outputs)}.npz")
    flags = [f"--solver={name}", "--evaluations=3", "--num_images=2"]
    assert command(sample, f"--workdir={run}", f"--output={outputs[-1]}", *flags).status == 0
  np.testing.assert_array_equal(*(np.load(output)["images"] for output in outputs))


@pytest.mark.parametrize("method", solver_search.METHODS)
def test_searched_solvers_are_files_that_sample_reads(command, run, tmp_path, method):
  flags = [f"--method={method}", "--trajectories=4", "--reference=20", "--fit_steps=1", "--nfe=3"]
  outcome = command(solver_search, f"--workdir={run}", f"--tables={tmp_path}", *flags)
  assert outcome.status == 0, outcome.err
  path = tmp_path / f"solver_{method}_3.json"
  assert tables.from_json(path.read_text()).num_rows == 3
  output = tmp_path / "drawn.npz"
  flags = [f"--solver={path}", f"--output={output}", "--num_images=2"]
  assert command(sample, f"--workdir={run}", *flags).status == 0
  assert np.load(output)["images"].shape[0] == 2


def test_a_grid_is_that_of_a_solver_that_evaluates_once_a_step(run):
  """2S's times hold its stages, Heun's and RK4's some times twice: none of them is a grid."""
  made, _, _ = experiment.restore_params(None, run)
  config = made.config.evaluation
  named = [
    solver_search.Named(
      0.0, name, "karras", solving.table(made.noising, config, solver=name, evaluations=5)
    )
    for name in ("dpmpp_2s", "heun", "rk4", "unipc_2", "ddim")
  ]
  search = solver_search.Search(made.noising, config, None, None, None, 1)
  assert solver_search.best_multistep(search, named).solver == "unipc_2"
  with pytest.raises(ValueError, match="evaluates once a step"):
    solver_search.best_multistep(search, named[:3])


@pytest.mark.parametrize(
  "flag, message",
  [("--method=lerned", "'lerned'; it is one of"), ("--nfe=1", "evaluations are 2 or more")],
)
def test_searches_that_cannot_be_are_one_line(command, run, flag, message):
  outcome = command(solver_search, f"--workdir={run}", flag)
  assert outcome.status != 0 and message in outcome.err


def test_distances_their_floor_and_the_classifiers_name(command, run, tmp_path):
  outcome = command(evaluate, f"--workdir={run}")
  assert outcome.status == 0, outcome.err
  result = json.loads((run / "evaluation.json").read_text())
  assert result["step"] == 6 and result["evaluations"] == 4 and result["num_images"] == 20
  assert result["distances"]["frechet"] > result["floor"]["frechet"] > 0
  assert result["distances"]["bits_per_dim"] > 0
  assert result["classifier"] in outcome.out
  made = experiment.build(fields.Config(checkpoint.load_config(run / "checkpoints")).lock())
  again = distances.features_of(made.config, made.examples, str(tmp_path / "classifier"))
  assert again.name == result["classifier"]


def test_an_average_that_was_not_kept_is_made_of_those_that_were(command, run):
  made, params, step = experiment.restore_params(None, run, average_std=0.08)
  abstract = jax.eval_shape(made.init_params, jax.random.key(0))
  stds, steps, snapshots = [], [], []
  with checkpoint.open_manager(workdirs.checkpoints(run), create=False) as manager:
    for at in (2, 4, 6):
      for i, std in enumerate(made.config.train.average_stds):
        stds, steps = [*stds, std], [*steps, at]
        snapshots.append(checkpoint.restore_part(manager, abstract, f"average/{i}", at).state)
  weights = averaging.posthoc_weights(stds, steps, 0.08, 6)
  assert step == 6
  for wanted, *parts in zip(*map(jax.tree.leaves, (params, *snapshots)), strict=True):
    np.testing.assert_allclose(wanted, sum(map(np.multiply, weights, parts)), atol=1e-5)


def test_points_are_trained_and_measured(command, tmp_path):
  more = {"data__num_points": 200, "model__width": 16}
  assert command(train, *arguments(tmp_path, "points", **more)).status == 0
  outcome = command(evaluate, f"--workdir={tmp_path}")
  assert outcome.status == 0 and "coordinates" in outcome.out


BAD = {
  "network": ({"model__network": "ditt"}, "config.model.network is 'ditt'; it is one of dit, mlp"),
  "head": ({"diffusion__head": "eps"}, "config.diffusion.head is 'eps'; it is one of data, flow"),
  "path": ({"diffusion__path": "ve"}, "config.diffusion.path is 've'; it is one of cosine"),
  "weighting": ({"diffusion__weighting": "x"}, "config.diffusion.weighting is 'x'"),
  "patches": ({"model__patch_size": 3}, "does not divide into"),
  "shares": ({"diffusion__clean_share": 2.0}, "config.diffusion.clean_share is 2.0"),
  "averages": ({"train__average_stds": "(0.5,)"}, "relative_std=0.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_field_is_named_before_anything_is_made(command, tmp_path, case):
  more, message = BAD[case]
  outcome = command(train, *arguments(tmp_path / "run", **more))
  assert outcome.status == 2 and message in outcome.err and outcome.err.count("\n") == 1
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variant", image_diffusion.VARIANTS)
def test_a_docstring_states_the_measured_number_of_parameters(variant):
  made = image_diffusion.get_config(variant)
  assert made.is_locked
  shape = {"digits": (8, 8, 1), "digits_unet": (8, 8, 1), "points": (2,)}.get(variant, (28, 28, 1))
  x, names = np.zeros((1, *shape), np.float32), None if variant == "points" else tuple("0123456789")
  examples = pixels.Examples(x, None, x, None, None, names)
  network_config = images.network_config_of(made, examples)
  network = images.MAKE[type(network_config)](network_config)
  shapes = jax.eval_shape(network.init, jax.random.key(0), x)
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
  entry = re.search(rf"^  {variant} .*\n(   .*\n)*", image_diffusion.__doc__, re.MULTILINE).group()
  stated = re.search(r"([\d.]+)M", entry)
  assert (stated is None) == (variant == "tfds")
  assert stated is None or stated.group(1) == f"{count / 1e6:.2f}"


def idx(path, array):
  header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
  path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.mark.parametrize("fault", ["none", "folder", "truncated", "number"])
def test_bad_files_of_fashion_mnist_are_named(command, tmp_path, fault):
  data = tmp_path / "data"
  data.mkdir()
  pixels = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
  for stem in ("train", "t10k"):
    idx(data / f"{stem}-images-idx3-ubyte.gz", pixels)
    idx(data / f"{stem}-labels-idx1-ubyte.gz", (np.arange(40) % 10).astype(np.uint8))
  damaged = data / "train-images-idx3-ubyte.gz"
  if fault == "folder":
    shutil.rmtree(data)
  elif fault == "truncated":
    damaged.write_bytes(damaged.read_bytes()[:5000])
  elif fault == "number":
    idx(damaged, pixels[:39])
  made = image_diffusion.get_config("fashion_dit")
  with made.unlocked():
    made.data.folder = str(data)
  if fault == "none":
    assert images.build(made).examples.train.shape == (40, 28, 28, 1)
    return
  with pytest.raises((ValueError, OSError), match=str(data)):
    images.build(made)


REFUSED = {
  "label": (["--labels=11"], "no class '11'"),
  "labels": (["--labels=cat"], "no class 'cat'"),
  "solver": (["--solver=dimm"], "is 'dimm'; it is one of ddim"),
  "evaluations": (["--solver=rk4", "--evaluations=0"], "evaluations"),
  "prompt": (["--prompt=12+3="], "--prompt means nothing here"),
  "output": (["--output=samples.gif"], "images go to a .png"),
  "average": (["--average_std=0.5"], "relative_std=0.5"),
  "both": (["--average_std=0.1", "--last"], "give one of them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_drawn_is_one_line(command, run, case):
  flags, message = REFUSED[case]
  outcome = command(sample, f"--workdir={run}", *flags)
  assert outcome.status in (1, 2) and message in outcome.err
