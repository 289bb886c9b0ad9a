"""Flags that samples of several kinds have: seed, guidance, and the file they go to."""

import pathlib

from absl import flags

SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
GUIDANCE = flags.DEFINE_float(
  "guidance", None, "Scale of guidance without a classifier; 1 is none. The config's if unset."
)
OUTPUT = flags.DEFINE_string(
  "output",
  None,
  "File for samples: JSONL of texts; PNG, or NPZ, of images. Or a folder to export to.",
)


def output() -> pathlib.Path | None:
  """The file that --output names; None is the screen.

  Raises:
    FileNotFoundError: its directory is not there.
  """
  if not OUTPUT.value:
    return None
  path = pathlib.Path(OUTPUT.value)
  if not path.parent.is_dir():
    raise FileNotFoundError(f"--output={path}: there is no such directory, make it.")
  return path
