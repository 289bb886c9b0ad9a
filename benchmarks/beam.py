"""What beams cost: a step of beam search against a step of decoding as many rows.

  python -m ancestral.benchmarks.beam

Beam search moves each beam's cache to where its beam went; that is what it adds to the step.
"""

import functools

import jax
import jax.numpy as jnp
from absl import app, flags

from ancestral.benchmarks import decode_hf
from ancestral.models import transformer
from ancestral.sampling import base, beam, decode, logits

_PROMPTS = flags.DEFINE_integer("prompts", 2, "B, prompts.")
_BEAMS = flags.DEFINE_integer("beams", 4, "K, beams of each.")

PROMPT = 64


def seconds(run) -> float:
  """Wall clock of one call."""
  return decode_hf.seconds(lambda: jax.block_until_ready(run()))


def main(_):
  """Prints milliseconds a step, by the room for new tokens."""
  config = transformer.TransformerConfig(**decode_hf.MODELS["30M"])
  model = transformer.transformer(config)
  params = transformer.unstack(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
  batch, beams = _PROMPTS.value, _BEAMS.value

  def inputs(rows):
    tokens = jax.random.randint(jax.random.key(1), (rows, PROMPT), 0, config.vocab_size)
    keys = base.row_keys(jax.random.key(0), jnp.arange(rows))
    return params, keys, decode.Prompts(tokens, jnp.full(rows, PROMPT))

  print("| new tokens | decoding B K rows, ms a step | beam search, ms a step |\n|---|---|---|")
  for room in (64, 192, 448):

    def greedy(params, keys, prompts, room=room):
      return decode.generate(
        model, params, keys, prompts, max_new_tokens=room, transform=logits.greedy()
      ).tokens

    def search(params, keys, prompts, room=room):
      algorithm = beam.beam_search(
        model, params, num_beams=beams, max_length=PROMPT + room, max_new_tokens=room
      )
      return beam.search(keys, algorithm, prompts).tokens

    times = []
    for function, rows in ((greedy, batch * beams), (search, batch)):
      run = functools.partial(jax.jit(function), *inputs(rows))
      jax.block_until_ready(run())
      times.append(1e3 / room * min(seconds(run) for _ in range(3)))
    print(f"| {room} | {times[0]:.1f} | {times[1]:.1f} |", flush=True)


if __name__ == "__main__":
  app.run(main)
