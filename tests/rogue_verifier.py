"""A verifier that does what the response says: what `tasks.workers` has to survive."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np

from ancestral.tasks import base

time.sleep(float(os.environ.get("ROGUE_IMPORT_SECONDS", 0)))


def verify(problem, response):
  match response:
    case "hang":
      time.sleep(60)
    case "hang with children":
      subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])
    case "crash":
      os.kill(os.getpid(), signal.SIGSEGV)
    case "exit":
      os._exit(3)
    case "raise":
      raise KeyError("no such thing")
    case "flood":
      for _ in range(2_000):
        print("x" * 10_000)
        os.write(1, b"y" * 10_000)
    case "long reason":
      return base.Verification(False, "z" * 10**8)
    case "memory":
      np.ones(2**40, np.uint8)
    case "nothing":
      return None
    case "close":
      os.closerange(3, 256)
      time.sleep(60)
    case "scribble":
      for descriptor in range(3, 64):
        with contextlib.suppress(OSError):
          os.write(descriptor, b"\0\0\1\0")
      time.sleep(60)
    case "garble":
      for descriptor in range(3, 64):
        with contextlib.suppress(OSError):
          os.write(descriptor, b'[1, true, ""]\n')
    case "meet":  # another response, which is verified at the same time
      folder = pathlib.Path(os.environ["ROGUE_MEETING"])
      (folder / str(os.getpid())).touch()
      while len(list(folder.iterdir())) < 2:
        time.sleep(0.01)
    case "wait":
      time.sleep(0.3)
  return base.Verification(response != "wrong", "" if response != "wrong" else "wrong")
