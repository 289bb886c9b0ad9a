"""Preference losses against TRL's and OpenRLHF's functions, in value and in torch's gradients."""

import contextlib
import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.training import divergences, preference, reference_free, unpaired
from parity import extracted

pytestmark = pytest.mark.peers
partial = functools.partial
RNG = np.random.default_rng(0)
POLICY, REFERENCE = (3 * RNG.normal(size=(2, 16)).astype(np.float32) for _ in range(2))
BETA, SMOOTHING = 0.3, 0.2


def trl(path, names, **given):
  import torch
  import torch.nn.functional as F

  given = {"torch": torch, "F": F, "math": math} | given
  return extracted.functions("trl", "0.24.0", f"trl/trainer/{path}", names, given)


@pytest.fixture(scope="module")
def dpo_loss(peers):
  kinds = SimpleNamespace(ALPHA_DIVERGENCE="alpha", JS_DIVERGENCE="js")
  constants = SimpleNamespace(
    ALPHA_DIVERGENCE_COEF_DEFAULT=1.0, ALPHA_DIVERGENCE_COEF_KEY="alpha_divergence_coef"
  )
  cap_exp = lambda x: peers[0].exp(peers[0].clamp(x, max=80))
  return trl(
    "dpo_trainer.py",
    ["DPOTrainer.dpo_loss"],
    FDivergenceType=kinds,
    FDivergenceConstants=constants,
    cap_exp=cap_exp,
  ).dpo_loss


def trainer(**settings):
  nothing = {"f_divergence_type": "reverse", "f_divergence_params": None, "reference_free": False}
  running = SimpleNamespace(mean=0.25, update=lambda x: None)
  accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x)
  args = SimpleNamespace(discopop_tau=0.05)
  shared = {"beta": BETA, "label_smoothing": 0.0, "running": running, "accelerator": accelerator}
  return SimpleNamespace(**({"args": args} | nothing | shared | settings))


def compare(ours, theirs, inputs, rtol=1e-5):
  """Values, and gradients under random weights of the values, of functions of the same arrays."""
  import torch

  tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
  expected = theirs(*tensors)
  weights = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
  (expected * torch.tensor(weights)).sum().backward()
  arrays = [jnp.asarray(x) for x in inputs]
  found = ours(*arrays)
  np.testing.assert_allclose(found, expected.detach().numpy(), rtol=rtol, atol=1e-6)
  total = lambda *arrays: jnp.sum(ours(*arrays) * weights)
  gradients = jax.grad(total, argnums=tuple(range(len(arrays))))(*arrays)
  for gradient, tensor in zip(gradients, tensors, strict=True):
    scale = np.abs(tensor.grad.numpy()).max()
    assert scale > 0
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=rtol, atol=rtol * scale)


def of_ratios(loss):
  return lambda w, l, ref_w, ref_l: loss(w - ref_w, l - ref_l)


SMOOTH = {"label_smoothing": SMOOTHING}
DPO = {  # TRL's name: ours, and what TRL's trainer is set to
  "sigmoid": (of_ratios(partial(preference.dpo, beta=BETA)), {}),
  "sigmoid, smoothed": (of_ratios(partial(preference.conservative, beta=BETA, **SMOOTH)), SMOOTH),
  "robust": (of_ratios(partial(preference.robust, beta=BETA, **SMOOTH)), SMOOTH),
  "exo_pair": (of_ratios(partial(preference.exo, beta=BETA)), {}),
  "exo_pair, smoothed": (of_ratios(partial(preference.exo, beta=BETA, **SMOOTH)), SMOOTH),
  "hinge": (of_ratios(partial(preference.hinge, beta=BETA)), {}),
  "ipo": (of_ratios(partial(preference.ipo, beta=BETA)), {}),
  "bco_pair": (of_ratios(partial(preference.bco, shift=0.25, beta=BETA)), {}),
  "sppo_hard": (of_ratios(partial(preference.sppo, beta=BETA)), {}),
  "nca_pair": (of_ratios(partial(preference.nca, beta=BETA)), {}),
  "aot": (
    lambda w, l, ref_w, ref_l: preference.aot(
      w - l, ref_w - ref_l, loss=partial(preference.conservative, beta=BETA, **SMOOTH)
    ),
    SMOOTH,
  ),
  "aot_pair": (of_ratios(partial(unpaired.aot, loss=partial(preference.dpo, beta=BETA))), {}),
  "apo_zero": (of_ratios(partial(preference.apo_zero, beta=BETA)), {}),
  "apo_down": (of_ratios(partial(preference.apo_down, beta=BETA)), {}),
  "discopop": (of_ratios(partial(preference.discopop, beta=BETA)), {}),
  "sigmoid, js": (
    of_ratios(
      lambda c, r: preference.dpo(
        divergences.jensen_shannon(c), divergences.jensen_shannon(r), beta=BETA
      )
    ),
    {"f_divergence_type": "js"},
  ),
  "sigmoid, alpha": (
    of_ratios(
      lambda c, r: preference.dpo(
        divergences.alpha(c, order=0.4), divergences.alpha(r, order=0.4), beta=BETA
      )
    ),
    {"f_divergence_type": "alpha", "f_divergence_params": {"alpha_divergence_coef": 0.4}},
  ),
}


@pytest.mark.parametrize("name", DPO)
def test_dpo_variants_are_trls(name, dpo_loss):
  ours, settings = DPO[name]
  theirs = lambda *logps: dpo_loss(trainer(**settings), *logps, name.split(",")[0])[0]
  compare(ours, theirs, (*POLICY, *REFERENCE))


@pytest.mark.parametrize("ipo", [False, True])
def test_dpo_and_ipo_are_openrlhfs(ipo, peers):
  import torch
  import torch.nn.functional as F

  given = {"torch": torch, "nn": torch.nn, "F": F, "Tuple": tuple}
  module = extracted.functions(
    "openrlhf", "0.11.2", "openrlhf/models/loss.py", ["DPOLoss.forward"], given
  )
  settings = SimpleNamespace(beta=BETA, label_smoothing=SMOOTHING, ipo=ipo)
  one = lambda *logps: module.forward(settings, *logps)[0]  # their mean of one pair is its loss
  theirs = lambda *logps: torch.stack([one(*x) for x in zip(*logps, strict=True)])
  loss = preference.ipo if ipo else partial(preference.conservative, label_smoothing=SMOOTHING)
  compare(of_ratios(partial(loss, beta=BETA)), theirs, (*POLICY, *REFERENCE))


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_kto_is_trls(kind, peers):
  torch = peers[0]
  kto_loss = trl("kto_trainer.py", ["KTOTrainer.kto_loss"]).kto_loss
  mismatched = RNG.normal(size=16).astype(np.float32) + 0.5
  settings = trainer(
    loss_type=kind, calculate_KL=kind == "kto", desirable_weight=1.5, undesirable_weight=0.7
  )

  def theirs(w, l, ref_w, ref_l):
    kl = torch.tensor(mismatched)
    return kto_loss(settings, w, l, kl, ref_w, ref_l, torch.zeros(16))[0]

  def ours(w, l, ref_w, ref_l):
    kl = unpaired.kto_kl(jnp.asarray(mismatched), jnp.ones(16))
    ratios, good = jnp.concatenate([w - ref_w, l - ref_l]), jnp.arange(32) < 16
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
    return unpaired.kto(ratios, good, kl if kind == "kto" else 0.0, beta=BETA, **weights)

  compare(ours, theirs, (*POLICY, *REFERENCE))


def test_bco_is_trls(peers):
  bco_loss = trl("bco_trainer.py", ["BCOTrainer.bco_loss"]).bco_loss
  means = []
  running = SimpleNamespace(mean=0.25, update=lambda x: means.append(float(x.mean())))
  settings = trainer(match_underlying_distribution=False, running=running)
  theirs = lambda *logps: bco_loss(settings, *logps, None, None)[0]
  good = jnp.arange(32) < 16
  ratios = lambda w, l, ref_w, ref_l: jnp.concatenate([w - ref_w, l - ref_l])
  ours = lambda *logps: unpaired.bco(ratios(*logps), good, 0.25, beta=BETA)
  compare(ours, theirs, (*POLICY, *REFERENCE))
  shift = unpaired.bco_shift(ratios(*POLICY, *REFERENCE), good, jnp.ones(32), beta=BETA)
  np.testing.assert_allclose(shift, means[0], rtol=1e-5)


LOG_PROBS = tuple(-np.abs(POLICY) / 3 - 0.01)


def test_orpo_is_trls(peers):
  odds = trl("orpo_trainer.py", ["ORPOTrainer.odds_ratio_loss"]).odds_ratio_loss
  theirs = lambda w, l: -w - odds(trainer(), w, l)[0]
  compare(partial(reference_free.orpo, weight=BETA), theirs, LOG_PROBS)


CPO = {
  "simpo": (partial(reference_free.simpo, beta=2.0, gamma=0.5), {"simpo_gamma": 0.5, "beta": 2.0}),
  "simpo, alpha": (
    partial(reference_free.alphapo, alpha=0.3, beta=2.0, gamma=0.5),
    {"simpo_gamma": 0.5, "beta": 2.0, "alpha": 0.3},
  ),
  "sigmoid": (
    lambda w, l: reference_free.cpo(w, l, jnp.zeros(16), beta=BETA),
    {},
  ),
}


@pytest.mark.parametrize("name", CPO)
def test_cpo_variants_are_trls(name, peers):
  cpo_loss = trl("cpo_trainer.py", ["CPOTrainer.cpo_loss"]).cpo_loss
  ours, settings = CPO[name]
  settings = trainer(loss_type=name.split(",")[0], **({"alpha": 0.0} | settings))
  compare(ours, lambda *logps: cpo_loss(settings, *logps)[0], LOG_PROBS)


def test_reference_sync_is_trls(peers):
  torch = peers[0]
  sync = trl("callbacks.py", ["SyncRefModelCallback._sync_target_model"])._sync_target_model
  model, target = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
  arrays = lambda module: [jnp.asarray(p.detach().numpy().copy()) for p in module.parameters()]
  before, params = arrays(target), arrays(model)
  sync(model, target, 0.6)
  for found, expected in zip(
    preference.reference_sync(before, params, 512), arrays(target), strict=True
  ):
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_trls_discopop_is_nan_of_a_very_wrong_pair_and_ours_is_its_logistic_limit(dpo_loss, peers):
  torch = peers[0]
  logps = [torch.tensor([x]) for x in (-400.0, 0.0, 0.0, 0.0)]
  theirs = dpo_loss(trainer(), *logps, "discopop")[0]
  assert torch.isnan(theirs).all()
  ours = preference.discopop(jnp.array([-400.0]), jnp.zeros(1), beta=BETA)
  np.testing.assert_allclose(ours, 400 * BETA, rtol=1e-6)


def test_trls_odds_are_infinite_of_a_certain_response_and_ours_are_not(peers):
  torch = peers[0]
  odds = trl("orpo_trainer.py", ["ORPOTrainer.odds_ratio_loss"]).odds_ratio_loss
  pair = np.array([-1e-9], np.float32), np.array([-1.0], np.float32)
  chosen, rejected = (torch.tensor(x, requires_grad=True) for x in pair)
  with contextlib.suppress(RuntimeError):
    odds(trainer(), chosen, rejected)[0].sum().backward()
  assert not torch.isfinite(chosen.grad).all()
  gradients = jax.grad(lambda c, r: reference_free.orpo(c, r).sum(), argnums=(0, 1))(*pair)
  assert np.isfinite(gradients).all()
