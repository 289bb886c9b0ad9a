"""Adapters against PEFT: the same directories, the same numbers, there and back."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import pretrained, transformer
from ancestral.training import lora, peft_layout

pytestmark = [
  pytest.mark.peers,
  pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

# Fields of the model, patterns, and whether the scale is rank-stabilised.
CASES = {
  "llama": ({}, ("attention/(query|value)/kernel",), False),
  "llama_one_layer": ({"scan_layers": False}, ("layers/1/.*(query|up)/kernel",), True),
  "qwen2_readout": ({"qkv_bias": True, "tied_embeddings": False}, ("kernel", "readout"), True),
  "gemma2": (targets.GEMMA2, ("kernel",), False),
  "gpt2": (targets.GPT2, ("attention/output/kernel", "mlp/(up|down)/kernel"), False),
}
TOKENS = np.random.default_rng(0).integers(0, 23, (3, 12))


@pytest.fixture(scope="module")
def peft(peers):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    yield pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def exact():
  with jax.default_matmul_precision("highest"):
    yield


def adapted(params, patterns, rank=3):
  made = lora.init(jax.random.key(0), params, patterns, rank)
  rng = np.random.default_rng(1)
  fill = lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32)
  return {path: lora.Adapter(a, fill(b)) for path, (a, b) in made.items()}


def ours(model, params):
  hidden, _ = targets.apply(model, params, jnp.asarray(TOKENS))
  return np.asarray(model.readout(params, hidden))


def theirs(torch, model):
  with torch.inference_mode():
    return model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_is_written_and_says_the_same(peers, peft, tmp_path, case):
  torch, transformers, _ = peers
  fields, patterns, stabilised = CASES[case]
  model, params = targets.tiny_target(**fields)
  config = targets.tiny_config(**fields)
  adapters = adapted(params, patterns)
  scale = (lora.rank_stabilised_scale if stabilised else lora.usual_scale)(5.0, 3)
  expected = ours(model, lora.merge(params, adapters, scale))
  assert np.abs(expected - ours(model, params)).max() > 0.1
  pretrained.write(tmp_path / "base", config, params)
  peft_layout.write(
    tmp_path / "adapters", config, adapters, alpha=5.0, rank_stabilised=stabilised, base="a base"
  )
  base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
  over = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapters"))
  names = {name for name, _ in over.named_parameters() if "lora_" in name}
  num_modules = sum(len(a) if a.ndim == 3 else 1 for a, _ in adapters.values())
  assert len(names) == 2 * num_modules
  np.testing.assert_allclose(theirs(torch, over), expected, atol=1e-4)

  merged = over.merge_and_unload()
  np.testing.assert_allclose(theirs(torch, merged), expected, atol=1e-4)
  pretrained.write(tmp_path / "merged", config, lora.merge(params, adapters, scale))
  own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
  state = own.state_dict()
  for name, value in merged.state_dict().items():
    np.testing.assert_allclose(value.numpy(), state[name].numpy(), atol=1e-5, err_msg=name)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_what_peft_saves_is_read(peers, peft, tmp_path, case):
  torch, transformers, _ = peers
  fields, _, _ = CASES[case]
  model, params = targets.tiny_target(**fields)
  config = targets.tiny_config(**fields)
  pretrained.write(tmp_path / "base", config, params)
  base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
  names = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_fc"]}[case]
  made = peft.LoraConfig(
    r=4,
    lora_alpha=6,
    use_rslora=True,
    target_modules=names,
    fan_in_fan_out=case == "gpt2",
    init_lora_weights=False,
  )
  torch.manual_seed(0)
  over = peft.get_peft_model(base, made)
  over.save_pretrained(str(tmp_path / "adapters"))
  found, scale = peft_layout.read(tmp_path / "adapters", config, stacked=True)
  assert scale == 3.0 and len(found) == len(names)
  expected = theirs(torch, over)
  np.testing.assert_allclose(ours(model, lora.merge(params, found, scale)), expected, atol=1e-4)
  apart, _ = peft_layout.read(tmp_path / "adapters", config)
  unstacked = transformer.unstack(params)
  np.testing.assert_allclose(ours(model, lora.merge(unstacked, apart, scale)), expected, atol=1e-4)
  assert np.abs(ours(model, params) - expected).max() > 0.1


def test_fields_that_are_refused_are_peft_s(peft):
  assert set(peft_layout._OFF) <= set(peft.LoraConfig().to_dict())


def test_a_is_drawn_as_peft_draws_it(peers, peft):
  """Both uniform: the same range, and no difference of their distributions."""
  torch, _, _ = peers
  torch.manual_seed(0)
  linear = torch.nn.Sequential(torch.nn.Linear(50, 40, bias=False))
  over = peft.get_peft_model(linear, peft.LoraConfig(r=64, target_modules=["0"]))
  theirs = over.base_model.model[0].lora_A["default"].weight.detach().numpy().ravel()
  params = {"kernel": jnp.zeros((50, 40))}
  ours = np.ravel(lora.init(jax.random.key(0), params, ("kernel",), 64)["kernel"].a)
  grid = np.linspace(-0.15, 0.15, 61)
  share = lambda x: (x[:, None] <= grid).mean(axis=0)
  # Kolmogorov and Smirnov: two samples of n are 1.95 sqrt(2 / n) apart once in a thousand times.
  assert np.abs(share(theirs) - share(ours)).max() < 1.95 * (2 / len(ours)) ** 0.5
  for x in (theirs, ours):
    assert 0.99 * 50**-0.5 < np.abs(x).max() <= 50**-0.5
