import pathlib
import subprocess
import sys
import time

import pytest

import rogue_verifier
from ancestral.tasks import arithmetic, base, workers


@pytest.fixture(autouse=True)
def importable(monkeypatch):
  """Workers import the module of a verifier by its name."""
  monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(rogue_verifier.__file__).parent))


PROBLEM = base.Problem("1+1=", "2", {"level": 1, "key": "1+1"})


def test_a_bad_response_costs_itself_only():
  faults = {
    "hang": "verifier: took longer than 2 s",
    "hang with children": "verifier: took longer than 2 s",
    "crash": "verifier: died (SIGSEGV)",
    "exit": "verifier: died (status 3)",
    "raise": "verifier: KeyError: 'no such thing'",
    "nothing": "verifier: AttributeError",
    "memory": "verifier: ",
    "close": "verifier: closed its socket",
    "scribble": "verifier: ",
    "garble": "verifier: answered what is no verdict",
  }
  responses = [x for fault in faults for x in (fault, "right", "wrong")] + ["flood", "long reason"]
  with workers.workers(rogue_verifier.verify, num_workers=2, timeout=2.0) as verify:
    verdicts = verify([(PROBLEM, response) for response in responses])
    again = verify([(PROBLEM, "right")] * 5)  # the pool is whole after all that
  assert all(verdict.correct for verdict in again)
  for response, verdict in zip(responses, verdicts, strict=True):
    if response in faults:
      assert not verdict.correct and verdict.reason.startswith(faults[response]), verdict
    elif response == "long reason":
      assert not verdict.correct and set(verdict.reason) == {"z"} and len(verdict.reason) <= 1_000
    else:
      assert verdict == (response != "wrong", "wrong" if response == "wrong" else "")


def test_workers_work_side_by_side(monkeypatch, tmp_path):
  monkeypatch.setenv("ROGUE_MEETING", str(tmp_path))
  with workers.workers(rogue_verifier.verify, num_workers=2, timeout=20.0) as verify:
    assert all(verdict.correct for verdict in verify([(PROBLEM, "meet")] * 2))


def test_verdicts_are_the_verifiers_own_and_in_order():
  task = arithmetic.addition()
  problems = base.problems(task, 0, 20)
  pairs = [(p, answer) for p in problems for answer in (p.answer, p.answer + "1", "")]
  with workers.workers(task.verify, num_workers=3) as verify:
    assert verify(pairs) == [task.verify(*pair) for pair in pairs]
    assert verify([]) == []


def test_what_cannot_work_is_said_at_once():
  with pytest.raises(ValueError, match="function of a module"):
    with workers.workers(lambda problem, response: None):
      pass
  with pytest.raises(ValueError, match="at least 1"):
    with workers.workers(arithmetic.addition().verify, num_workers=0):
      pass


def test_a_call_that_is_broken_off_leaves_no_verdicts_behind(monkeypatch):
  """The next call's are its own."""
  with workers.workers(rogue_verifier.verify, num_workers=2, timeout=10.0) as verify:
    assert verify([(PROBLEM, "right")])[0].correct  # they have started

    def interrupt(*arguments):
      raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
      patch.setattr(workers.select, "select", interrupt)
      verify([(PROBLEM, "wait"), (PROBLEM, "wait")])
    responses = ["right", "wrong", "wrong", "right"]
    verdicts = verify([(PROBLEM, response) for response in responses])
  assert [verdict.correct for verdict in verdicts] == [True, False, False, True]


def test_a_response_in_time_is_not_judged_late_while_a_worker_is_replaced(monkeypatch):
  monkeypatch.setenv("ROGUE_IMPORT_SECONDS", "2.5")
  with workers.workers(rogue_verifier.verify, num_workers=2, timeout=2.0) as verify:
    found = verify([(PROBLEM, "hang"), (PROBLEM, "right"), *[(PROBLEM, "wait")] * 6])
  assert [verdict.correct for verdict in found] == [False] + [True] * 7


def test_a_worker_that_cannot_start_is_said():
  with pytest.raises(RuntimeError, match=r"failed \(ModuleNotFoundError"):
    with pytest.MonkeyPatch.context() as patch:
      patch.setenv("PYTHONPATH", "")  # the verifier's module is nowhere to be found
      with workers.workers(rogue_verifier.verify, num_workers=1) as verify:
        verify([(PROBLEM, "right")])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they live on")
def test_workers_die_with_a_program_that_is_killed(tmp_path):
  script = tmp_path / "program.py"
  script.write_text(
    "import sys\n"
    f"sys.path.insert(0, {str(pathlib.Path(rogue_verifier.__file__).parent)!r})\n"
    "import rogue_verifier\n"
    "from ancestral.tasks import base, workers\n"
    "problem = base.Problem('', '', {})\n"
    "with workers.workers(rogue_verifier.verify, num_workers=1, timeout=60) as verify:\n"
    "  verify([(problem, 'right')])\n"
    "  print('ready', flush=True)\n"
    "  verify([(problem, 'hang')])\n"
  )
  with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as program:
    assert program.stdout.readline() == "ready\n"
    children = pathlib.Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    assert len(children) == 1
    program.kill()
  for _ in range(100):
    if not pathlib.Path(f"/proc/{children[0]}").exists():
      break
    time.sleep(0.1)
  else:
    raise AssertionError("the worker is still there")
