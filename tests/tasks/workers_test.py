import pathlib
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


def test_workers_work_side_by_side():
  pairs = [(PROBLEM, "wait")] * 8
  with workers.workers(rogue_verifier.verify, num_workers=8, timeout=10.0) as verify:
    start = time.monotonic()
    assert all(verdict.correct for verdict in verify(pairs))
  assert time.monotonic() - start < 8 * 0.3


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
