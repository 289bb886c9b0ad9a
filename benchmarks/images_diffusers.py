"""Images per second of class-conditional sampling against diffusers: same weights, same noise.

  python -m ancestral.benchmarks.images_diffusers                       # digits, batch 1, 16, 256
  python -m ancestral.benchmarks.images_diffusers --size=medium --dtype=bfloat16      # for a GPU
  python -m ancestral.benchmarks.images_diffusers --csv=out.csv

A DiT and a U-Net that predict noise, with random weights, under DPM-Solver++ 2M on latent
diffusion's chain. Ours is one compiled program of the whole loop, the table of coefficients and the
number of steps being arguments. The peer is diffusers' loop, `scheduler.step` in Python, around
its own network, eager and under torch.compile. Before anything is timed, images from the same noise
have to agree to 1e-3 of their RMS, for two numbers of steps; in bfloat16 that is reported.

Repetitions alternate between the systems, and medians are reported. What the first call takes
longer than the second is compilation, which finds no cache. Theirs has its coefficients made anew
in every call, as in pipelines, and its steps' index given, so that it need not be searched for.
"Network alone" is the same network applied as often with nothing between, in a compiled loop
(ours), in Python (theirs). The bound is the network's arithmetic (of the program before it is
optimised: no padding, elementwise operations included) at the speed of a large matrix product.
Float32 products are float32 in all (no TF32). The machine has to be idle: torch's threads spin
while they wait for each other, and where another process holds a core that costs it up to 100x.
"""

import csv
import functools
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ancestral.configs import image_diffusion
from ancestral.models import base, diffusers_layout, dit, precondition, schedules, unet
from ancestral.sampling import base as sampling
from ancestral.sampling import grids, multistep, solvers, tables

# (side of the image, {network: variant of configs/image_diffusion.py})
SIZES = {
  "small": (8, {"DiT": "digits", "U-Net": "digits_unet"}),
  "medium": (28, {"DiT": "fashion_dit", "U-Net": "fashion_unet"}),
}
_SIZE = flags.DEFINE_enum("size", "small", list(SIZES), "8 x 8 digits, or 28 x 28 Fashion-MNIST.")
_NETWORKS = flags.DEFINE_list("networks", ["DiT", "U-Net"], "Which.")
_BATCHES = flags.DEFINE_list("batches", ["1", "16", "256"], "Batch sizes.")
_STEPS = flags.DEFINE_integer("steps", 20, "Evaluations of the network for an image.", 2, 100)
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed repetitions of each system.", 1)
_LEAST = flags.DEFINE_float("least_seconds", 0.2, "A repetition is as many calls as last so long.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and compute.")
_MODE = flags.DEFINE_string("compile_mode", "default", "Of torch.compile: reduce-overhead, ...")
_CHANNELS_LAST = flags.DEFINE_bool("channels_last", False, "The memory format of their network.")
_PEAK = flags.DEFINE_float("peak_tflops", 0.0, "The machine's; 0 measures a matrix product's.")
_CSV = flags.DEFINE_string("csv", None, "File for the results.")

CHAIN = schedules.from_betas(schedules.scaled_linear_betas())
NUM_CLASSES = 10
NUM_ROWS = 100  # of the padded table


class Case(NamedTuple):
  """One row of the table: a network with its weights on both sides, and what it starts from."""

  network: base.Network
  params: base.Params
  model: Any  # torch.nn.Module
  noise: np.ndarray  # [B, H, W, C], the first state
  labels: np.ndarray  # [B]


def networks(name: str, side: int, variant: str) -> tuple[base.Network, base.Params, Any]:
  """The network of a variant, random params, and diffusers' model with the same."""
  import diffusers
  import torch

  fields = image_diffusion.get_config(variant).model.to_dict()
  fields |= {"image_shape": (side, side, 1), "num_classes": NUM_CLASSES, "dtype": _DTYPE.value}
  del fields["network"]
  if name == "DiT":
    config = dit.DiTConfig(**fields)
    network, kind = dit.dit(config), diffusers.DiTTransformer2DModel
    settings, to_state = diffusers_layout.dit_settings, diffusers_layout.dit_to_diffusers
  else:
    config = unet.UNetConfig(**fields)
    network, kind = unet.unet(config), diffusers.UNet2DModel
    settings, to_state = diffusers_layout.unet_settings, diffusers_layout.unet_to_diffusers
  params = randomised(network.init(jax.random.key(0), jnp.zeros((1, side, side, 1))))
  model = kind(**settings(config)).eval()
  state = {key: torch.tensor(np.array(leaf)) for key, leaf in to_state(params, config).items()}
  missing, unexpected = model.load_state_dict(state, strict=False)
  if unexpected or not all(key.startswith("pos_embed.pos_embed") for key in missing):
    raise ValueError(f"Weights do not fit: {missing=}, {unexpected=}.")
  model = model.to(device(), getattr(torch, _DTYPE.value))
  if _CHANNELS_LAST.value:
    model = model.to(memory_format=torch.channels_last)
  return network, jax.tree.map(lambda leaf: leaf.astype(_DTYPE.value), params), model


def randomised(params: base.Params) -> base.Params:
  """Params whose zeros (of gates, last layers) are numbers too; all others moved as well."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  noisy = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  return jax.tree.unflatten(tree, noisy)


def device() -> str:
  """Where torch computes: where jax does."""
  return "cuda" if jax.default_backend() == "gpu" else "cpu"


def table(num_steps: int) -> tables.SolverTable:
  """DPM-Solver++ 2M from the state at the chain's end, with rows that do nothing to NUM_ROWS."""
  made = multistep.dpmpp_2m(CHAIN, grids.trailing(CHAIN, num_steps))
  return tables.padded(tables.from_state(made), NUM_ROWS)


def scheduler():
  """The same in diffusers."""
  import diffusers

  chain = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
  solver = {"algorithm_type": "dpmsolver++", "solver_order": 2, "timestep_spacing": "trailing"}
  return diffusers.DPMSolverMultistepScheduler(**chain, **solver)


def ours(case: Case) -> tuple[Callable, Callable, list]:
  """The whole loop in one program, and the network alone in a loop; both of a number of steps.

  Beside them, a list that grows with every program compiled for the first.
  """
  programs = []
  placed = functools.cache(lambda num_steps: jax.tree.map(jnp.float32, table(num_steps)))
  noise, condition = jnp.asarray(case.noise), base.Condition(jnp.asarray(case.labels))
  keys = sampling.row_keys(jax.random.key(0), jnp.arange(len(case.noise)))

  @jax.jit
  def sample(params, keys, condition, table, num_rows, x):
    programs.append("loop")
    apply = lambda x, level: case.network.apply(params, x, level, condition)
    denoise = precondition.denoiser(apply, CHAIN, precondition.NOISE, lambda t: t - 1)
    return solvers.sample(keys, denoise, table, x, num_rows=num_rows)

  @jax.jit
  def alone(params, condition, times, num_rows, x):
    level = lambda i: jnp.broadcast_to(times[i] - 1, x.shape[:1])
    body = lambda i, x: case.network.apply(params, x, level(i), condition)
    return jax.lax.fori_loop(0, num_rows, body, x)

  loop = lambda n: sample(case.params, keys, condition, placed(n), n, noise)
  network = lambda n: alone(case.params, condition, placed(n).times, n, noise)
  finished = lambda run: lambda n: run(n).block_until_ready()
  return finished(loop), finished(network), programs


def theirs(case: Case, network: Callable) -> tuple[Callable, Callable]:
  """The loop of a pipeline around a network, and the network alone; both of a number of steps."""
  import torch

  x0 = torch.from_numpy(case.noise.transpose(0, 3, 1, 2).copy())
  x0 = x0.to(device(), getattr(torch, _DTYPE.value))
  if _CHANNELS_LAST.value:
    x0 = x0.to(memory_format=torch.channels_last)
  labels = torch.from_numpy(case.labels.astype(np.int64)).to(device())
  chain = scheduler()

  def run(num_steps, advance):
    with torch.no_grad():
      x = x0
      chain.set_timesteps(num_steps, device=device())
      chain.set_begin_index(0)
      for t in chain.timesteps:
        output = network(x, t.expand(len(x)), class_labels=labels, return_dict=False)[0]
        x = advance(output, t, x)
      if device() == "cuda":
        torch.cuda.synchronize()
      return x

  step = lambda output, t, x: chain.step(output, t, x, return_dict=False)[0]
  return lambda n: run(n, step), lambda n: run(n, lambda output, t, x: output)


def seconds(function: Callable[[], Any], calls: int = 1) -> float:
  """Wall clock of one call, the mean of some."""
  start = time.perf_counter()
  for _ in range(calls):
    function()
  return (time.perf_counter() - start) / calls


def disagreement(ours: jax.Array, theirs: Any) -> float:
  """The largest difference of images over their RMS: that is about 15, 1 / alpha of the noise."""
  theirs = theirs.float().cpu().numpy().transpose(0, 2, 3, 1)
  return float(np.abs(np.asarray(ours) - theirs).max() / np.sqrt(np.mean(np.square(theirs))))


def flops(case: Case) -> float:
  """Of one evaluation of one image."""
  apply = lambda params, x, *args: case.network.apply(params, x, args[0], base.Condition(args[1]))
  lowered = jax.jit(apply).lower(case.params, case.noise, np.zeros(len(case.noise)), case.labels)
  return lowered.cost_analysis()["flops"] / len(case.noise)


def matmul_peak() -> float:
  """FLOP/s of a large matrix product, jax's or torch's, whichever is faster."""
  import torch

  n = 8192 if jax.default_backend() == "gpu" else 2048
  a, b = jnp.ones((n, n), _DTYPE.value), torch.ones(n, n).to(device(), getattr(torch, _DTYPE.value))
  multiply = jax.jit(jnp.matmul)

  def theirs():
    torch.mm(b, b)
    if device() == "cuda":
      torch.cuda.synchronize()

  least = math.inf
  for function in (lambda: multiply(a, a).block_until_ready(), theirs):
    least = min(least, *[seconds(function) for _ in range(11)][1:])
  return 2 * n**3 / least


def compile_time(run: Callable[[int], Any]) -> float:
  """Seconds by which the first call is longer than the second."""
  once = functools.partial(run, _STEPS.value)
  return seconds(once) - seconds(once)


def compare(case: Case) -> dict[str, Any]:
  """One row: checks that images agree, then times."""
  import torch

  sample, network, programs = ours(case)
  row = {"flops": flops(case), "ours_compile_s": compile_time(sample)}
  if not 0.05 < np.std(network(1)) < 20:
    raise ValueError("The network's output is not like noise; the images would not depend on it.")
  torch._dynamo.reset()  # so that this shape is the first, and dimensions are constants
  torch._dynamo.utils.counters.clear()
  eager, eager_network = theirs(case, case.model)
  compiled, _ = theirs(case, torch.compile(case.model, mode=_MODE.value, dynamic=False))
  systems = {"ours": sample, "ours_network": network}
  systems |= {"eager": eager, "eager_network": eager_network, "compiled": compiled}
  try:
    row["torch_compile_s"] = compile_time(compiled)
  except Exception as error:  # whatever its backend fails with: no compiler, an operation
    print(f"torch.compile fails here: {type(error).__name__}: {str(error).splitlines()[0]}")
    del systems["compiled"]
  row |= agreement(programs, sample, [systems[w] for w in ("eager", "compiled") if w in systems])
  for name, times in timed(systems).items():
    row[f"{name}_s"] = statistics.median(times)
    row |= {f"{name}_least_s": min(times), f"{name}_most_s": max(times)}
  return row


def agreement(programs: list, sample: Callable, peers: list[Callable]) -> dict[str, Any]:
  """The images' differences, and what is compiled anew when the number of steps is another.

  Raises:
    ValueError: images differ, in float32.
  """
  import torch

  num_graphs = lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
  count, graphs, differences = len(programs), num_graphs(), []
  for num_steps in (_STEPS.value, _STEPS.value // 2):
    images = sample(num_steps)
    differences += [disagreement(images, peer(num_steps)) for peer in peers]
  if _DTYPE.value == "float32" and not np.max(differences) < 1e-3:
    raise ValueError(f"Images differ by {differences} of their RMS.")
  return {
    "images_differ": float(np.max(differences)),
    "ours_programs": count,
    "ours_new_programs": len(programs) - count,
    "torch_graphs": graphs,
    "torch_new_graphs": num_graphs() - graphs,
  }


def timed(systems: dict[str, Callable[[int], Any]]) -> dict[str, list[float]]:
  """Seconds of a call, for each repetition, the systems taking turns."""
  runs = {name: functools.partial(run, _STEPS.value) for name, run in systems.items()}
  for run in runs.values():
    run()
  calls = {name: max(1, math.ceil(_LEAST.value / seconds(run))) for name, run in runs.items()}
  times = {name: [] for name in runs}
  for _ in range(_REPEATS.value):
    for name, run in runs.items():
      time.sleep(0.05)  # while threads of the one before still spin
      times[name].append(seconds(run, calls[name]))
  return times


COLUMNS = (
  "network | batch | ours, images/s | eager | compiled | ours / eager | ours / compiled "
  "| bound | ours of it | eager | compiled",
  "network | batch | step of ours, ms | network alone | solver's share | step of eager, ms "
  "| network alone | solver's share | GFLOP/s, ours | compiling, s: ours | torch "
  "| compiled anew for other steps: ours | torch | images differ by",
)


def show(rows: list[dict[str, Any]], peak: float) -> None:
  """The two tables, as markdown."""
  rate = lambda row, name: row["batch"] / row.get(f"{name}_s", math.nan)
  step = lambda row, name: 1e3 * row[f"{name}_s"] / row["steps"]
  rates, parts = [], []
  for row in rows:
    found = [rate(row, name) for name in ("ours", "eager", "compiled")]
    bound = peak / (row["flops"] * row["steps"])
    ratios = [f"{found[0] / other:.2f}" for other in found[1:]]
    shares = [f"{value / bound:.1%}" for value in found]
    who = [row["network"], str(row["batch"])]
    rates.append([*who, *(f"{value:.1f}" for value in found), *ratios, f"{bound:.0f}", *shares])
    both = []
    for name in ("ours", "eager"):
      whole, network = step(row, name), step(row, f"{name}_network")
      both += [f"{whole:.3f}", f"{network:.3f}", f"{1 - network / whole:.1%}"]
    speed = found[0] * row["flops"] * row["steps"] / 1e9
    compiling = [row["ours_compile_s"], row.get("torch_compile_s", math.nan)]
    anew = [f"{row[f'{w}_new_{p}']}" for w, p in (("ours", "programs"), ("torch", "graphs"))]
    differ = f"{row['images_differ']:.1e}"
    cells = [f"{speed:.1f}", *(f"{value:.1f}" for value in compiling), *anew, differ]
    parts.append([*who, *both, *cells])
  for columns, cells in zip(COLUMNS, (rates, parts), strict=True):
    print(f"\n| {columns} |\n" + "|---" * (columns.count("|") + 1) + "|")
    for line in cells:
      print(f"| {' | '.join(line)} |".replace("nan%", "fails").replace("nan", "fails"))


def processor() -> str:
  """What computes: the accelerator, or the CPU's model and how many cores there are."""
  info = pathlib.Path("/proc/cpuinfo")
  if jax.default_backend() != "cpu" or not info.exists():
    return jax.devices()[0].device_kind
  names = [line.split(":")[1].strip() for line in info.open() if line.startswith("model name")]
  return f"{os.cpu_count()} cores, {(names or [platform.machine()])[0]}"


def conditions(peak: float) -> dict[str, Any]:
  """What all rows share: machine, versions, settings."""
  import diffusers
  import torch

  return {
    "date": time.strftime("%Y-%m-%d"),
    "machine": processor(),
    "load": os.getloadavg()[0],
    "peak_gflops": round(peak / 1e9, 1),
    "versions": f"jax {jax.__version__}; torch {torch.__version__}; "
    f"diffusers {diffusers.__version__}",
    "torch_threads": torch.get_num_threads(),
    "size": _SIZE.value,
    "dtype": _DTYPE.value,
    "compile_mode": _MODE.value,
    "channels_last": _CHANNELS_LAST.value,
    "repeats": _REPEATS.value,
    "steps": _STEPS.value,
  }


def main(_):
  """Prints the tables, and writes the rows."""
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too
  import torch

  torch._inductor.config.force_disable_caches = True
  torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True
  if _DTYPE.value == "float32":
    jax.config.update("jax_default_matmul_precision", "highest")
  shared = conditions(1e12 * _PEAK.value or matmul_peak())
  print("; ".join(f"{name} {value}" for name, value in shared.items()), flush=True)
  made = [1e3 * seconds(lambda: table(_STEPS.value)) for _ in range(3)]
  set_up = [1e3 * seconds(lambda: scheduler().set_timesteps(_STEPS.value)) for _ in range(3)]
  print(f"our table is made once in {min(made):.1f} ms, their scheduler in {min(set_up):.1f} ms")
  rows, (side, variants) = [], SIZES[_SIZE.value]
  for name in _NETWORKS.value:
    network, params, model = networks(name, side, variants[name])
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    for batch in map(int, _BATCHES.value):
      rng = np.random.default_rng(batch)
      noise = rng.normal(size=(batch, side, side, 1)).astype(np.float32)
      labels = rng.integers(0, NUM_CLASSES, batch).astype(np.int32)
      row = compare(Case(network, params, model, noise, labels))
      rows.append({"network": name, "parameters": count, "batch": batch, **shared, **row})
      print(f"{name} {count / 1e6:.2f}M, {batch}: {row['flops'] / 1e6:.1f} MFLOP", flush=True)
  show(rows, 1e9 * shared["peak_gflops"])
  if _CSV.value:
    with open(_CSV.value, "w", newline="") as file:
      writer = csv.DictWriter(file, max(rows, key=len), restval="")
      writer.writeheader()
      writer.writerows(rows)


if __name__ == "__main__":
  app.run(main)
