"""What is shown of a model while it trains: answers and texts, in Markdown, beside the numbers."""

from collections.abc import Sequence
from typing import Any

from ..evaluation import attempts


def summary(made: Sequence[attempts.Attempt]) -> dict[str, Any]:
  """The share of right answers, over all and by level, and some of the answers, in Markdown."""
  rows = attempts.summarise(made)["pass@1"]
  mean = sum(row.mean * row.count for row in rows) / sum(row.count for row in rows)
  by_level = {f"pass@1/level_{row.level}": row.mean for row in rows}
  return {"pass@1": mean, **by_level, "samples": _shown(made)}


def _shown(made: Sequence[attempts.Attempt], most: int = 12) -> str:
  """Answers to some of the problems, spread over the levels, as a table in Markdown."""
  code = lambda text: "`" + text.replace("`", "'").replace("|", "\\|").replace("\n", " ") + "`"
  some = made[:: -(-len(made) // most)]
  rows = [
    f"| {code(a.problem.prompt)} | {code(a.responses[0])} | {a.verdicts[0].reason or 'correct'} |"
    for a in some
  ]
  return "\n".join(["| prompt | answer | verdict |", "|---|---|---|", *rows])


def quoted(texts: Sequence[str]) -> str:
  """Texts one after another, as they are, in Markdown."""
  return "\n\n---\n\n".join("\n".join(f"    {line}" for line in text.split("\n")) for text in texts)
