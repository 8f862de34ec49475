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

"""Follows tokens through a traced forward pass: which layers they have passed when they meet a layer's weights.

Nothing is computed. A stack of layers is followed through transposed axes into a scan, whose body is followed once per
layer. What cannot be followed counts as having passed all layers, and so does all that comes of it, which is no order.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import operator

from jax.extend import core
import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state


@dataclasses.dataclass(frozen=True)
class Tokens:
  """A value that depends on the tokens and on the weights of some layers, a set in the bits of an integer."""

  after: int = 0


LOST = Tokens(-1)  # All layers.
_KEEPING_PLACES = frozenset(("convert_element_type", "copy", "device_put", "sharding_constraint"))


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
  """A value that depends on weights alone.

  Attributes:
    layers: the layer of each element, broadcast to the value's shape.
    leaves: the paths of the leaves that it depends on.
  """

  layers: np.ndarray
  leaves: frozenset[abstract_state.Path]

  @property
  def distinct(self) -> frozenset[int]:
    """The layers, looking only once along broadcast axes."""
    return frozenset(np.unique(self.layers[tuple(slice(None if step else 1) for step in self.layers.strides)]).tolist())


Value = Tokens | Weights | None  # None depends on neither.


def _joined(values: Sequence[Value]) -> Value:
  """What is known of a value that may be any of these."""
  if all(value is values[0] for value in values):
    return values[0]
  return LOST if any(isinstance(value, Weights) for value in values) else _tokens(values)


def _tokens(values: Iterable[Value]) -> Tokens | None:
  """The tokens among some values, as one."""
  found = [value.after for value in values if isinstance(value, Tokens)]
  return Tokens(functools.reduce(operator.or_, found)) if found else None


class Follower:
  """Goes through a program and records what has met what.

  Attributes:
    met: for each leaf and layer, the set of layers that the tokens have passed when they meet it.
  """

  def __init__(self):
    self.met: dict[tuple[abstract_state.Path, int], int] = {}

  def follow(self, jaxpr: core.Jaxpr, values: Sequence[Value]) -> list[Value]:
    """Goes through a program with these arguments, and returns its results."""
    known = dict(zip(jaxpr.invars, values))
    read = lambda variable: None if isinstance(variable, core.Literal) else known.get(variable)
    for equation in jaxpr.eqns:
      known |= zip(equation.outvars, self._results(equation, [read(variable) for variable in equation.invars]))
    return [read(variable) for variable in jaxpr.outvars]

  def _results(self, equation, values) -> list[Value]:
    if all(value is None for value in values):
      return [None] * len(equation.outvars)
    programs = [p for p in equation.params.values() if isinstance(p, (core.Jaxpr, core.ClosedJaxpr))]
    bodies = [program.jaxpr if isinstance(program, core.ClosedJaxpr) else program for program in programs]
    if len(bodies) == 1 and len(bodies[0].invars) == len(values):
      follow = functools.partial(self._scan, equation) if equation.primitive.name == "scan" else self.follow
      return follow(bodies[0], values)
    weights = [value for value in values if isinstance(value, Weights)]
    if (tokens := _tokens(values)) is None:
      return self._of_weights(equation, weights)
    return [self._meet(weights, tokens)] * len(equation.outvars)

  def _meet(self, weights, tokens) -> Tokens:
    """The result of tokens that meet weights."""
    after = tokens.after
    for value in weights:
      for layer in value.distinct:
        after |= 1 << layer
        for leaf in value.leaves:
          self.met[leaf, layer] = self.met.get((leaf, layer), 0) | tokens.after
    return Tokens(after)

  def _of_weights(self, equation, weights) -> list[Value]:
    """The result of weights alone: a stack is followed while its elements keep their places or axes are transposed."""
    shapes = [variable.aval.shape for variable in equation.outvars]
    distinct = frozenset().union(*(value.distinct for value in weights))
    if len(distinct) == 1:
      leaves = frozenset().union(*(value.leaves for value in weights))
      return [Weights(np.broadcast_to(np.int32(min(distinct)), shape), leaves) for shape in shapes]
    name, layers = equation.primitive.name, weights[0].layers
    if name == "transpose":
      return [Weights(layers.transpose(equation.params["permutation"]), weights[0].leaves)]
    if name in _KEEPING_PLACES and len(weights) == len(shapes) == 1:
      return weights
    return [self._meet(weights, LOST)] * len(shapes)

  def _scan(self, equation, body, values) -> list[Value]:
    """A loop: over layers, once for each; over anything else, until nothing changes."""
    is_stacked = lambda outer, inner: outer.aval.shape != inner.aval.shape
    first = len(values) - sum(map(is_stacked, equation.invars, body.invars))  # Of those looped over.
    carried = sum(not is_stacked(*pair) for pair in zip(equation.outvars, body.outvars))
    before, carry, stacks = values[: first - carried], values[first - carried : first], values[first:]
    at = lambda i: [Weights(it.layers[i], it.leaves) if isinstance(it, Weights) else it for it in stacks]
    results, last = [], None
    if any(isinstance(value, Weights) and len(value.distinct) > 1 for value in stacks):
      for i in range(equation.params["length"])[:: -1 if equation.params["reverse"] else 1]:
        results.append(self.follow(body, [*before, *carry, *at(i)]))
        carry = results[-1][:carried]
    else:
      while carry != last:
        results = [self.follow(body, [*before, *carry, *at(0)])]
        last, carry = carry, [_joined(pair) for pair in zip(carry, results[0])]
    return [*carry, *(_joined((*pieces, None)) for pieces in zip(*(result[carried:] for result in results)))]
