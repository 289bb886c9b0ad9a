"""Skip-Tuning: a U-Net's skip connections scaled while sampling, and the distance to real images.

  python -m ancestral.launch.train --config=configs/image_diffusion.py:digits_unet \\
      --workdir=runs/unet --seeds=0,1,2
  python -m ancestral.benchmarks.skip_tuning --run=runs/unet

Scales are linear from 1 for the shallowest connection to --scales for the deepest. Beside Frechet's
distance stands the squared error of the denoised held-out images, over that without scaling: the
paper finds the first to fall while the second rises.

Reference: Ma et al. 2024, arXiv 2402.15170.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ancestral.benchmarks import image_runs
from ancestral.launch import images, solving
from ancestral.models import base, unet

_SCALES = flags.DEFINE_list("scales", "0.7,0.8,0.85,0.9,0.95,1,1.05,1.1", "Of the deepest.")
_NFE = flags.DEFINE_list("nfe", "5,10,20", "Numbers of evaluations.")


def denoising_errors(run: image_runs.Run, scales) -> np.ndarray:
  """Mean squared error of the denoised held-out images by noise ratio, [scales, ratios]."""
  examples, noising = run.experiment.examples, run.experiment.noising
  clean, condition = jnp.asarray(examples.test), base.Condition(jnp.asarray(examples.test_labels))
  noise = jax.random.normal(jax.random.key(0), clean.shape)

  @jax.jit
  def error(params, skips, t):
    alpha, sigma = noising.alpha(t), noising.sigma(t)
    model = images.tuned(run.experiment, skips)
    return jnp.mean((model(params, alpha * clean + sigma * noise, t, condition) - clean) ** 2)

  ratios = np.geomspace(0.1, 10, 7)
  times = [jnp.float32(noising.time(-np.log(ratio))) for ratio in ratios]
  return np.array([[error(run.params, skips, t) for t in times] for skips in scales])


def main(_) -> None:
  """Prints one table."""
  runs = image_runs.load()
  evaluations = [int(n) for n in _NFE.value]
  scales = [
    jnp.asarray(unet.linear_skips(runs[0].experiment.network_config, float(scale)), jnp.float32)
    for scale in _SCALES.value
  ]
  unscaled = _SCALES.value.index("1")
  errors = np.mean([denoising_errors(run, scales) for run in runs], axis=0)
  errors = np.mean(errors / errors[unscaled], axis=1)
  found = np.zeros((len(scales), len(evaluations), len(runs)))
  for r, run in enumerate(runs):
    draw = image_runs.sampler(run, max(evaluations))
    make_model = lambda skips, run=run: images.tuned(run.experiment, skips)
    for s, skips in enumerate(scales):
      for e, n in enumerate(evaluations):
        samples = draw(
          image_runs.table(run, solving.SOLVER.value or "dpmpp_2m", n), skips, make_model
        )
        found[s, e, r] = image_runs.frechet(run, samples)
  print("| deepest scale | " + " | ".join(f"{n} evaluations" for n in evaluations) + " | error |")
  print("|---" * (len(evaluations) + 2) + "|")
  for scale, by_nfe, error in zip(_SCALES.value, found, errors, strict=True):
    cells = [f"{v.mean():.4f} ± {(v.max() - v.min()) / 2:.4f}" for v in by_nfe]
    print(f"| {scale} | " + " | ".join(cells) + f" | {error:.3f} |")
  print(f"\nfloor {image_runs.floor(runs[0]):.4f}; {len(runs)} runs; mean ± half the range")


if __name__ == "__main__":
  app.run(main)
