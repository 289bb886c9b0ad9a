"""Scripts for clusters: what they run, with which arguments, by stand-ins for what they call."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SLURM, TPU = LAUNCH / "slurm.sbatch", LAUNCH / "tpu_pod.sh"
AWKWARD = ["--config.a=two words", "--config.b=it's", '--config.c="$HOME" *', "--config.d="]
SLICE = {"TPU": "mine", "ZONE": "us-east5-b", "ACCELERATOR": "v6e-64", "RUNTIME": "v2-alpha-tpuv6e"}


@pytest.fixture
def stand_ins(tmp_path):
  """A folder of programs that note what they are called with, as JSON lines of `calls`."""
  folder = tmp_path / "bin"
  folder.mkdir()
  for name in ("srun", "scontrol", "gcloud", "python3", "ancestral_venv/bin/python"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
      f"#!{sys.executable}\n"
      "import json, os, sys\n"
      f"with open({str(tmp_path / 'calls')!r}, 'a') as file:\n"
      f"  file.write(json.dumps([{name!r}, *sys.argv[1:]]) + '\\n')\n"
      f"sys.exit(int(os.environ.get('STATUS_OF_SRUN', 0)) if {name!r} == 'srun' else 0)\n"
    )
    path.chmod(0o755)
  return folder


@pytest.fixture
def bash(stand_ins, tmp_path):
  """(*arguments, **environment) -> (status, standard output, standard error, calls)."""

  def run(*arguments, **environment):
    calls = tmp_path / "calls"
    calls.unlink(missing_ok=True)
    done = subprocess.run(
      ["bash", *map(str, arguments)],
      env={"PATH": f"{stand_ins}:{os.environ['PATH']}", **environment},
      cwd=stand_ins,
      capture_output=True,
      text=True,
    )
    lines = calls.read_text().splitlines() if calls.exists() else []
    return done.returncode, done.stdout, done.stderr, [json.loads(line) for line in lines]

  return run


def both_ways(bash, *arguments, **environment):
  """What is called; and that a dry run calls nothing, and prints just that."""
  status, out, err, calls = bash(*arguments, **environment)
  assert (status, out, err) == (0, "", "")
  status, printed, err, none = bash(*arguments, DRY_RUN="1", **environment)
  assert (status, err, none) == (0, "", [])
  assert bash("-c", printed)[3] == calls
  return calls


def test_slurm_runs_a_binary_in_every_task(bash):
  (call,) = both_ways(bash, SLURM, "ancestral.launch.train", *AWKWARD, SLURM_NTASKS="16")
  binary = ["python3", "-m", "ancestral.launch.train"]
  assert call == ["srun", "--kill-on-bad-exit=1", *binary, *AWKWARD, "--distributed"]


@pytest.mark.parametrize("tasks", [{}, {"SLURM_NTASKS": "1"}])
def test_slurm_joins_nothing_in_one_task(bash, tasks):
  (call,) = both_ways(bash, SLURM, "ancestral.launch.evaluate", "--workdir=a b", **tasks)
  assert call[2:] == ["python3", "-m", "ancestral.launch.evaluate", "--workdir=a b"]


def test_slurm_takes_the_python_that_it_is_given(bash):
  (call,) = both_ways(bash, SLURM, "ancestral.launch.train", PYTHON="/some where/python")
  assert call[2:4] == ["/some where/python", "-m"]


@pytest.mark.parametrize("status, requeued", [(143, True), (1, False), (137, False), (0, False)])
def test_slurm_puts_back_into_the_queue_what_was_told_to_stop(bash, status, requeued):
  environment = {"STATUS_OF_SRUN": str(status), "SLURM_JOB_ID": "7"}
  found, _, _, (_, *after) = bash(SLURM, "ancestral.launch.train", **environment)
  assert found == status
  assert after == ([["scontrol", "requeue", "7"]] if requeued else [])


def test_slurm_has_a_task_for_every_gpu_and_binds_none():
  options = [line for line in SLURM.read_text().splitlines() if line.startswith("#SBATCH ")]
  given = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in options)
  assert given["ntasks-per-node"] == given["gpus-per-node"]
  assert not {"gpus-per-task", "gpu-bind", "gres"} & given.keys()
  assert given["signal"].startswith("TERM@") and "requeue" in given


def test_a_slice_is_asked_for_and_given_back(bash):
  queued = ["gcloud", "compute", "tpus", "queued-resources"]
  zone = "--zone=us-east5-b"
  kind = ["--node-id=mine", "--accelerator-type=v6e-64", "--runtime-version=v2-alpha-tpuv6e"]
  assert both_ways(bash, TPU, "create", **SLICE) == [[*queued, "create", "mine", *kind, zone]]
  (spot,) = both_ways(bash, TPU, "create", SPOT="1", **SLICE)
  assert spot == [*queued, "create", "mine", *kind, "--spot", zone]
  (status,) = both_ways(bash, TPU, "status", **SLICE)
  assert status == [*queued, "describe", "mine", "--format=value(state.state)", zone]
  (delete,) = both_ways(bash, TPU, "delete", **SLICE)
  assert delete == [*queued, "delete", "mine", "--force", "--quiet", zone]


def there(bash, call):
  """What a machine of the slice runs, of a call of `ssh`."""
  (command,) = [word for word in call if word.startswith("--command=")]
  assert call[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "mine"]
  assert "--worker=all" in call and call[-1] == "--zone=us-east5-b"
  return bash("-c", command.removeprefix("--command="))[3]


def test_every_machine_runs_the_binary_with_the_very_arguments(bash):
  (call,) = both_ways(bash, TPU, "run", "ancestral.launch.train", *AWKWARD, **SLICE)
  (ran,) = there(bash, call)
  binary = ["ancestral_venv/bin/python", "-m", "ancestral.launch.train"]
  assert ran == [*binary, *AWKWARD, "--distributed"]


def test_the_wheel_and_the_rest_are_copied_and_installed(bash):
  copy, ssh = both_ways(bash, TPU, "install", "my dist/a.whl", "my configs", **SLICE)
  copied = ["scp", "--recurse", "--worker=all", "my dist/a.whl", "my configs", "mine:"]
  assert copy == ["gcloud", "compute", "tpus", "tpu-vm", *copied, "--zone=us-east5-b"]
  made, installed = there(bash, ssh)
  assert made == ["python3", "-m", "venv", "ancestral_venv"]
  assert installed[:4] == ["ancestral_venv/bin/python", "-m", "pip", "install"]
  assert installed[-2:] == ["./a.whl", "jax[tpu]"]


def test_a_share_is_mounted_where_one_is_named(bash):
  *_, mount = both_ways(bash, TPU, "install", "a.whl", NFS="host:/some share", **SLICE)
  assert r"sudo mount host:/some\ share /mnt/runs" in "".join(mount)


def test_a_folder_is_fetched_from_the_first_machine(bash):
  (call,) = both_ways(bash, TPU, "fetch", "/mnt/runs/a b", ".", **SLICE)
  assert call[4:8] == ["scp", "--recurse", "--worker=0", "mine:/mnt/runs/a b"]


@pytest.mark.parametrize(
  "arguments, environment, words",
  [
    ([SLURM], {}, "no binary"),
    ([TPU], SLICE, "is not one of create"),
    ([TPU, "destroy"], SLICE, "destroy is not one of create"),
    ([TPU, "run"], SLICE, "give a binary"),
    ([TPU, "install"], SLICE, "give the wheel"),
    ([TPU, "install", "configs"], SLICE, "configs is no wheel"),
    ([TPU, "fetch", "/mnt/runs/a"], SLICE, "a folder there and a folder here"),
    ([TPU, "status"], {"ZONE": "z"}, "TPU: "),
    ([TPU, "status"], {"TPU": "t"}, "ZONE: "),
    ([TPU, "create"], {"TPU": "t", "ZONE": "z", "RUNTIME": "r"}, "ACCELERATOR: "),
  ],
)
def test_a_mistake_is_one_line_and_calls_nothing(bash, arguments, environment, words):
  status, out, err, calls = bash(*arguments, **environment)
  assert status != 0 and out == "" and calls == []
  assert words in err and len(err.splitlines()) == 1
