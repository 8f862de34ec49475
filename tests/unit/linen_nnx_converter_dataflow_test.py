# Copyright 2026 Google LLC
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#    https://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Which layers tokens have gone through where they meet a layer's weights, in programs of JAX."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import dataflow

LAYERS = 4


def layer(tokens, weight):
  return tokens + jnp.tanh(tokens @ weight), None


def scanned(tokens, weights):
  return jax.lax.scan(layer, tokens, weights)[0]


def met(program, layers) -> list[int]:
  """The set of layers before each, of weights whose layers are so along their axes."""
  layers = np.asarray(layers)
  weights = np.broadcast_to(layers, layers.shape[:-2] + (3, 3) if layers.shape[-2:] == (1, 1) else layers.shape)
  arguments = (jax.ShapeDtypeStruct((2, 3), np.float32), jax.ShapeDtypeStruct(weights.shape, np.float32))
  follower = dataflow.Follower()
  values = [dataflow.Tokens(), dataflow.Weights(weights, frozenset([("w",)]))]
  follower.follow(jax.make_jaxpr(program)(*arguments).jaxpr, values)
  return [follower.met[("w",), n] for n in range(int(weights.max()) + 1)]


def stack(*sizes):
  """The layers of a stack of matrices: its first axes are layer axes."""
  return np.arange(np.prod(sizes)).reshape(*sizes, 1, 1)


IN_ORDER = [0b0, 0b1, 0b11, 0b111]


class DataflowTest(parameterized.TestCase):

  def test_a_scan_applies_layers_in_order(self):
    self.assertEqual(met(scanned, stack(LAYERS)), IN_ORDER)

  def test_in_a_program_of_its_own(self):
    self.assertEqual(met(jax.jit(jax.checkpoint(scanned)), stack(LAYERS)), IN_ORDER)

  def test_a_reverse_scan_begins_with_the_last(self):
    program = lambda tokens, weights: jax.lax.scan(layer, tokens, weights, reverse=True)[0]
    self.assertEqual(met(program, stack(LAYERS)), [0b1110, 0b1100, 0b1000, 0b0])

  def test_a_layer_axis_is_moved(self):
    of_axis_1 = np.broadcast_to(np.arange(3).reshape(1, 3, 1), (3, 3, 3))
    program = lambda tokens, weights: scanned(tokens, jnp.moveaxis(weights.astype(jnp.bfloat16), 1, 0))
    self.assertEqual(met(program, of_axis_1), IN_ORDER[:3])
    self.assertNotEqual(met(scanned, of_axis_1), IN_ORDER[:3])

  def test_two_layer_axes_of_one_length(self):
    blocks = lambda tokens, weights: jax.lax.scan(lambda t, w: (scanned(t, w), None), tokens, weights)[0]
    exchanged = lambda tokens, weights: blocks(tokens, jnp.swapaxes(weights, 0, 1))
    self.assertEqual(met(blocks, stack(2, 2)), IN_ORDER)
    self.assertEqual(met(exchanged, stack(2, 2)), [0b0, 0b101, 0b1, 0b111])

  def test_layers_side_by_side_have_no_order(self):
    program = lambda tokens, weights: jax.vmap(lambda w: layer(tokens, w)[0])(weights).sum(0)
    self.assertEqual(met(program, stack(LAYERS)), [0] * LAYERS)

  @parameterized.parameters(
      lambda weights: weights[::-1],
      lambda weights: jnp.roll(weights, 1, axis=0),
      lambda weights: weights[jnp.array([1, 0, 2, 3])],
      lambda weights: jnp.cumsum(weights, axis=0),
      lambda weights: jnp.sort(weights, axis=0),
  )
  def test_what_cannot_be_followed_is_no_order(self, changed):
    found = met(lambda tokens, weights: scanned(tokens, changed(weights)), stack(LAYERS))
    self.assertNotEqual(found, IN_ORDER)
    self.assertLess(min(found), 0)  # All layers.


if __name__ == "__main__":
  absltest.main()
