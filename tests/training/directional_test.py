"""Directions: unit vectors, what is best in them, how they are written."""

import jax
import jax.numpy as jnp
import numpy as np

from ancestral.training import directional


def test_directions_are_unit_vectors_of_uniform_angles():
  angles = directional.angles(jax.random.key(0), (4000,), low=-np.pi / 4, high=0.0)
  assert angles.min() >= -np.pi / 4 and angles.max() < 0
  quartiles = np.quantile(angles, [0.25, 0.5, 0.75])
  np.testing.assert_allclose(quartiles, -np.pi / 4 * np.array([0.75, 0.5, 0.25]), atol=0.03)
  directions = directional.unit(angles)
  np.testing.assert_allclose(np.linalg.norm(directions, axis=-1), 1, rtol=1e-6)
  np.testing.assert_allclose(
    np.arctan2(directions[:, 1], directions[:, 0]), angles, rtol=1e-4, atol=1e-6
  )


def test_axes_want_one_reward_each():
  angles = jnp.array([0.0, np.pi / 2, -np.pi / 2, np.pi / 4])
  rewards = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.9, 0.9], [0.0, -1.0]])
  best = directional.best_of(jnp.broadcast_to(rewards, (4, 4, 2)), directional.unit(angles))
  np.testing.assert_array_equal(best, [0, 1, 3, 2])


def test_reward_is_the_projection_and_the_first_of_equals_is_best():
  rng = np.random.default_rng(0)
  rewards, directions = rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 4))
  found = directional.reward(
    jnp.asarray(rewards, jnp.float32), jnp.asarray(directions, jnp.float32)
  )
  np.testing.assert_allclose(
    found, np.einsum("bkd,bd->bk", rewards, directions), rtol=1e-5, atol=1e-6
  )
  assert directional.best_of(jnp.ones((3, 2)), jnp.array([0.6, 0.8])) == 0


def test_the_best_are_vertices_of_the_convex_hull():
  # answers on a concave front: every one is best in some direction, the one inside in none
  rewards = jnp.array([[1.0, 0.0], [0.8, 0.6], [0.5, 0.5], [0.0, 1.0]])
  angles = jnp.linspace(0, np.pi / 2, 91)
  best = directional.best_of(jnp.broadcast_to(rewards, (91, 4, 2)), directional.unit(angles))
  assert set(np.asarray(best).tolist()) == {0, 1, 3}


def test_written_directions_are_whole_numbers():
  template = "{prompt} [right*{0} brief*{1}]"
  direction = directional.unit(jnp.deg2rad(jnp.array(-15.0)))
  text = directional.written(template, "2+2=", direction)
  assert text == "2+2= [right*97 brief*-26]"
  assert directional.written("<{0},{1}>{prompt}", "{x}", [0.6, 0.8], scale=10) == "<6,8>{x}"
