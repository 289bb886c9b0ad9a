"""What several processes agree on, as far as one can see: tests/launch has real ones."""

import jax
import numpy as np
import pytest

from ancestral.training import processes


def test_alone_nothing_is_waited_for():
  processes.barrier("alone", timeout=0.001)
  assert processes.from_first({"a": [1, None]}) == {"a": [1, None]}
  with pytest.raises(ZeroDivisionError), processes.together("alone", timeout=0.001):
    1 / 0  # noqa: B018


def test_what_failed_here_is_the_cause_of_what_is_missing(monkeypatch, capsys):
  """Else a full disk here would look like another process's fault."""

  def missing(name, *, timeout):
    raise processes.MissingProcessError("Missing: 1")

  monkeypatch.setattr(processes, "barrier", missing)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(processes.MissingProcessError) as caught:
    with processes.together("a run", timeout=1):
      raise OSError("no space left on device")
  assert isinstance(caught.value.__cause__, OSError)
  assert "OSError: no space left on device" in capsys.readouterr().err


def test_a_barrier_names_who_is_missing(monkeypatch):
  message = "Barrier timed out. # of tasks: 1/3. Some timed out task names:\n1\n2\n\nRPC: /x"

  def wait(*, key, timeout_ms):
    assert (key, timeout_ms) == ("here", 1500)
    raise jax.errors.JaxRuntimeError(message)

  monkeypatch.setattr(processes.ocp.multihost, "get_barrier_sync_fn", lambda: wait)
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  with pytest.raises(processes.MissingProcessError, match=r"within 1.5 s. Missing .*: 1, 2\."):
    processes.barrier("here", timeout=1.5)
  assert np.isscalar(jax.process_index())
