"""A page of a run's rollouts: every sample, its verdict and its reward, to read and to filter.

  python -m ancestral.launch.rollouts --workdir=runs/grpo [--last_steps=20]

Writes WORKDIR/rollouts.html, one file that needs nothing else.
"""

import collections
import html
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags

from . import flags

READS = (flags.WORKDIR,)
_LAST = absl_flags.DEFINE_integer(
  "last_steps", 20, "How many of the last rounds to show.", lower_bound=1
)

_PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>
  body {{ font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; color: #222; }}
  pre {{ margin: 0; white-space: pre-wrap; font: 13px/1.4 ui-monospace, monospace; }}
  section {{ border-top: 1px solid #ddd; padding: .6em 0; }}
  table {{ border-collapse: collapse; margin: .3em 0 0 1em; }}
  td {{ padding: 0 1em 0 0; vertical-align: top; }}
  .right {{ color: #0a6b2d; }} .wrong {{ color: #a3261b; }} .small {{ color: #777; }}
</style>
<h1>{title}</h1>
<p>
  <label>round <select id="step"></select></label>
  <label>show <select id="which">
    <option value="">all</option><option value="mixed">right and wrong</option>
    <option value="none">never right</option><option value="all">always right</option>
  </select></label>
  <label>text <input id="text" placeholder="prompt, answer or reason"></label>
  <span id="count" class="small"></span>
</p>
<main></main>
<script type="application/json" id="data">{data}</script>
<script>
const groups = JSON.parse(document.getElementById("data").textContent);
const [step, which, text] = ["step", "which", "text"].map(id => document.getElementById(id));
const element = (tag, content, className) => {{
  const made = document.createElement(tag);
  made.textContent = content;
  if (className) made.className = className;
  return made;
}};
const steps = [...new Set(groups.map(group => group.step))];
for (const value of steps) step.append(element("option", value));
step.value = steps.at(-1);
const kind = group => {{
  const right = group.samples.filter(sample => sample.correct).length;
  return right === 0 ? "none" : right === group.samples.length ? "all" : "mixed";
}};
function show() {{
  const chosen = groups.filter(group => group.step == step.value
    && (!which.value || kind(group) === which.value)
    && JSON.stringify(group).toLowerCase().includes(text.value.toLowerCase()));
  document.getElementById("count").textContent = `${{chosen.length}} problems`;
  document.querySelector("main").replaceChildren(...chosen.map(group => {{
    const section = element("section", "");
    const right = group.samples.filter(sample => sample.correct).length;
    section.append(element("pre", group.prompt),
      element("span", `${{right}} of ${{group.samples.length}} right`, "small"));
    const table = section.appendChild(element("table", ""));
    for (const sample of group.samples) {{
      const row = table.insertRow();
      row.insertCell().append(element("pre", sample.text, sample.correct ? "right" : "wrong"));
      row.insertCell().append(element("span", `reward ${{sample.reward.toFixed(2)}}`));
      row.insertCell().append(element("span", `log p ${{sample.log_prob.toFixed(2)}}`, "small"));
      row.insertCell().append(element("span", sample.reason));
    }}
    return section;
  }}));
}}
for (const control of [step, which, text]) control.addEventListener("input", show);
show();
</script>
"""


def page(title: str, groups: Sequence[dict[str, Any]]) -> str:
  """The page of groups, records as `training.rollouts.jsonl` writes them."""
  data = json.dumps(groups, ensure_ascii=False).replace("<", "\\u003c")  # no end of the script
  return _PAGE.format(title=html.escape(title), data=data)


def last_steps(path: pathlib.Path, count: int) -> list[dict[str, Any]]:
  """The records of the last `count` rounds of a file; a last line cut off is left out.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it has no rounds.
  """
  if not path.exists():
    raise FileNotFoundError(f"{path} is not there: has the run learned from samples?")
  rounds: collections.deque[list[dict[str, Any]]] = collections.deque(maxlen=count)
  with path.open(encoding="utf-8") as lines:
    for line in lines:
      if not line.endswith("\n"):
        break
      group = json.loads(line)
      if not rounds or rounds[-1][0]["step"] != group["step"]:
        rounds.append([])
      rounds[-1].append(group)
  if not rounds:
    raise ValueError(f"{path} has no rounds to show.")
  return [group for groups in rounds for group in groups]


def write(workdir: pathlib.Path, count: int) -> pathlib.Path:
  """Writes WORKDIR/rollouts.html of the last `count` rounds."""
  groups = last_steps(workdir / "rollouts.jsonl", count)
  path = workdir / "rollouts.html"
  path.write_text(page(f"Rollouts of {workdir.name}", groups), encoding="utf-8")
  return path


def main(_: Sequence[str]) -> None:
  """Writes the page of --workdir."""
  with flags.one_line_errors():
    path = write(pathlib.Path(flags.required(flags.WORKDIR)), _LAST.value)
  print(path.resolve())


if __name__ == "__main__":
  flags.run(main, READS)
