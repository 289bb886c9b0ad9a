"""Distance of samples to real images by evaluations of the network, for the ten best solvers.

  python -m ancestral.launch.train --config=configs/image_diffusion.py --workdir=runs/dit \\
      --seeds=0,1,2
  python -m ancestral.benchmarks.image_solvers --run=runs/dit --figure=docs/figures/digits_dit.png

The distance is Frechet's, of the features of the classifier in --classifier (trained there if it is
missing), between samples and as many real images of the same classes. Its floor is that between two
halves of the real images; beside it stands DDIM of --reference evaluations. The ten are those of
the least distance at --rank evaluations, a mean over runs. Intervals are over the runs: different
seeds of training and of noise.
"""  # fmt: skip

import csv

import numpy as np
from absl import app, flags

from ancestral.benchmarks import image_runs
from ancestral.launch import solving

_NFE = flags.DEFINE_list("nfe", "4,6,8,10,15,20,30", "Numbers of evaluations.")
_RANK = flags.DEFINE_integer("rank", 10, "Evaluations at which solvers are ranked.")
_MOST = flags.DEFINE_integer("most", 10, "Solvers that are followed.")
_REFERENCE = flags.DEFINE_integer("reference", 1000, "Evaluations of the reference, by DDIM.")
_REFERENCES = flags.DEFINE_integer("references", 3, "Runs of which there is a reference.")
_FIGURE = flags.DEFINE_string("figure", None, "File for the figure.")
_CSV = flags.DEFINE_string("csv", None, "File for every distance.")


def ranked(runs, draws) -> list[str]:
  """The solvers of least mean distance at --rank evaluations."""
  means = {}
  for name in solving.SOLVERS:
    try:
      tables = [image_runs.table(run, name, _RANK.value) for run in runs]
    except ValueError:  # it evaluates more than that in a step
      continue
    found = [
      image_runs.frechet(run, draw(table))
      for run, draw, table in zip(runs, draws, tables, strict=True)
    ]
    means[name] = float(np.mean(found))
    print(f"  {name} {means[name]:.4f}", flush=True)
  return sorted(means, key=means.get)[: _MOST.value]


def measured(runs, draws, names, evaluations) -> dict[tuple[str, int], list[float]]:
  """(solver, evaluations) -> its distance on each run."""
  found = {}
  for name in names:
    for n in evaluations:
      try:
        made = [image_runs.table(run, name, n) for run in runs]
      except ValueError:
        continue
      found[name, n] = [
        image_runs.frechet(run, draw(table))
        for run, draw, table in zip(runs, draws, made, strict=True)
      ]
    print(f"  {name}", flush=True)
  return found


def show(found, names, evaluations, floor, reference) -> None:
  """The table, as markdown: means, and half the range over runs."""
  print("\n| solver | " + " | ".join(map(str, evaluations)) + " |")
  print("|---" * (len(evaluations) + 1) + "|")
  for name in names:
    cells = [
      f"{np.mean(v):.3f} ± {(max(v) - min(v)) / 2:.3f}" if (v := found.get((name, n))) else ""
      for n in evaluations
    ]
    print(f"| {name} | " + " | ".join(cells) + " |")
  print(f"\nfloor {floor:.4f}; DDIM of {_REFERENCE.value}: {np.mean(reference):.4f} {reference}")


def plot(path, found, names, evaluations, floor, reference) -> None:
  """Distance against evaluations."""
  from matplotlib import figure

  made = figure.Figure(figsize=(7, 4.5))
  axes = made.subplots()
  for name in names:
    shown = [n for n in evaluations if (name, n) in found]
    values = np.array([found[name, n] for n in shown])
    (line,) = axes.plot(shown, values.mean(1), marker=".", label=name)
    axes.fill_between(shown, values.min(1), values.max(1), alpha=0.12, color=line.get_color())
  axes.axhline(floor, color="black", linestyle=":", label="two real halves")
  label = f"DDIM, {_REFERENCE.value}"
  axes.axhline(float(np.mean(reference)), color="grey", linestyle="--", label=label)
  axes.set(
    xscale="log", yscale="log", xlabel="evaluations of the network", ylabel="Frechet distance"
  )
  axes.set_xticks(evaluations, [str(n) for n in evaluations], minor=False)
  axes.minorticks_off()
  axes.legend(fontsize=8, ncols=2)
  axes.grid(alpha=0.3)
  made.savefig(path, dpi=120, bbox_inches="tight")


def main(_) -> None:
  """Ranks, measures, and shows."""
  evaluations = [int(n) for n in _NFE.value]
  runs = image_runs.load()
  draws = [image_runs.sampler(run, max(*evaluations, _RANK.value)) for run in runs]
  print(f"{len(runs[0].real.labels)} images; features of {runs[0].features.name}", flush=True)
  names = ranked(runs, draws)
  found = measured(runs, draws, names, evaluations)
  reference = [
    image_runs.frechet(run, draw(image_runs.table(run, "ddim", _REFERENCE.value)))
    for run, draw in zip(runs[: _REFERENCES.value], draws, strict=False)
  ]
  floor = image_runs.floor(runs[0])
  show(found, names, evaluations, floor, reference)
  if _CSV.value:
    with open(_CSV.value, "w", newline="") as file:
      writer = csv.writer(file)
      writer.writerow(["solver", "evaluations", "seed", "frechet"])
      for (name, n), values in found.items():
        writer.writerows([name, n, seed, v] for seed, v in enumerate(values))
  if _FIGURE.value:
    plot(_FIGURE.value, found, names, evaluations, floor, reference)


if __name__ == "__main__":
  app.run(main)
