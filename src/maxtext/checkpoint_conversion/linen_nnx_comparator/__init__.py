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

"""Compares two MaxText checkpoints, Linen or NNX, scanned or not, leaf by leaf and to the bit.

The converter's own plans map both onto one canonical tree, the plain `TrainStateNNX` with one module per layer, where a
weight has the same path whatever checkpoint it comes from:

  model/decoder/layers_3/mlp/wi_0/kernel
  optimizer/opt_state/0/mu/decoder/layers_3/mlp/wi_0/kernel
  optimizer/step

A leaf is on one side only, or has another shape or dtype, or its values are compared: equal to the bit, or how far apart.
Empty nodes, which hold nothing, are not compared.

From the command line: `python -m maxtext.checkpoint_conversion.linen_nnx_comparator A B`.
"""

from etils import epy

# Imported when they are used: `--help` and an import of this package need neither JAX nor Orbax.
with epy.lazy_api_imports(globals()):
  # pylint: disable=g-importing-member
  from maxtext.checkpoint_conversion.linen_nnx_comparator.__main__ import main
  from maxtext.checkpoint_conversion.linen_nnx_comparator.compare import compare_checkpoints
