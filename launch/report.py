"""One self-contained HTML page about a run: curves, the table, and answers with their verdicts."""

import base64
import html
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation import coverage
from ..training import metrics

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .75rem; text-align: left; border-bottom: 1px solid #ddd; }
code { font: 14px ui-monospace, monospace; white-space: pre-wrap; }
img { max-width: 100%; }
.right { color: #176b2c; } .wrong { color: #a3231f; }
"""


def figure(plot: Any) -> str:
  """A matplotlib figure as an <img> that holds its own data."""
  buffer = io.BytesIO()
  plot.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
  data = base64.b64encode(buffer.getvalue()).decode()
  return f'<img alt="curves" src="data:image/png;base64,{data}">'


def picture(image: Any, alt: str) -> str:
  """A Pillow image as an <img> that holds its own data."""
  buffer = io.BytesIO()
  image.save(buffer, format="PNG")
  data = base64.b64encode(buffer.getvalue()).decode()
  return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


# What a run measures of what is held out: the first of these that it has, and what it is called.
_HELD_OUT = {
  "pass@1": "Right answers to held-out problems",
  "accuracy": "Accuracy on held-out examples",
  "held_out_loss": "Loss of held-out examples",
}


def curves(workdir: str | pathlib.Path) -> Any:
  """Loss, and what is held out, by step: from metrics.jsonl, as a matplotlib figure."""
  from matplotlib import figure as figures  # an extra; no global state, so no pyplot

  records = metrics.read_jsonl(pathlib.Path(workdir) / "metrics.jsonl")
  made = figures.Figure(figsize=(10, 3.5))
  loss, held_out = made.subplots(1, 2)
  measured = next((name for name in _HELD_OUT if _names(records, name)), "pass@1")
  for axes, names, title in [
    (loss, ["loss"], "Training loss"),
    (held_out, _names(records, measured), _HELD_OUT[measured]),
  ]:
    for name in names:
      points = [(record["step"], record[name]) for record in records if name in record]
      axes.plot(
        *zip(*points, strict=True),
        label="all" if name == measured else name.replace(f"{measured}/level_", "level "),
        marker="" if name == "loss" else ".",
      )
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
  if measured != "held_out_loss":
    held_out.set_ylim(-0.02, 1.02)
  if len(_names(records, measured)) > 1:
    held_out.legend()
  return made


def _names(records: Sequence[dict], prefix: str) -> list[str]:
  return sorted({name for record in records for name in record if name.startswith(prefix)})


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Cells are HTML."""
  line = lambda tag, cells: "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"
  return "<table>" + line("th", header) + "".join(line("td", row) for row in rows) + "</table>"


def interval(row: coverage.Row) -> str:
  """A mean and its 95% interval."""
  return f"{row.mean:.3f} [{row.low:.2f}, {row.high:.2f}]"


def scores(columns: Mapping[str, Sequence[coverage.Row]]) -> str:
  """The table that `attempts.summarise` makes: a row a level, 95% intervals."""
  rows = [
    [str(cells[0].level), str(cells[0].count), *map(interval, cells)]
    for cells in zip(*columns.values(), strict=True)
  ]
  return _table(["level", "problems", *columns], rows)


def columns(found: Mapping[str, Mapping[str, float]]) -> str:
  """Numbers by name, of several things: a column each."""
  first, *_ = found.values()
  rows = [[name, *(f"{values[name]:.4g}" for values in found.values())] for name in first]
  return _table(["", *found], rows)


def answers(attempts: Sequence[dict[str, Any]], most: int = 30) -> str:
  """Wrong answers with the verifier's reason, each distinct one once; then some right ones."""
  rows = {}
  for attempt in attempts:
    for response in attempt["responses"]:
      key = attempt["prompt"], response["text"]
      rows.setdefault(key, [*key, attempt["answer"], response["correct"], response["reason"]])
  wrong = [row for row in rows.values() if not row[3]]
  right = [row for row in rows.values() if row[3]]
  code = lambda text: f"<code>{html.escape(text)}</code>"
  cells = [
    [
      code(prompt),
      code(text),
      code(answer),
      '<span class="right">correct</span>'
      if correct
      else f'<span class="wrong">{html.escape(reason)}</span>',
    ]
    for prompt, text, answer, correct, reason in wrong[:most] + right[-5:]
  ]
  return (
    f"<p>Distinct answers: {len(wrong)} wrong and {len(right)} right; here are "
    f"{min(most, len(wrong))} and {min(5, len(right))} of them.</p>"
    + _table(["problem", "sampled answer", "true answer", "verdict"], cells)
  )


def write(path: str | pathlib.Path, title: str, sections: dict[str, str]) -> pathlib.Path:
  """Writes the page; sections are headings and their HTML."""
  body = "".join(f"<h2>{html.escape(name)}</h2>{content}" for name, content in sections.items())
  path = pathlib.Path(path)
  path.write_text(
    f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{body}</html>",
    encoding="utf-8",
  )
  return path
