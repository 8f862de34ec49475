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

"""Converts MaxText train states between Flax Linen and Flax NNX, exact to the bit.

The same state, in the two frameworks:

  Linen TrainState                              NNX TrainStateNNX
  params/params/W                               model/W
  opt_state/<i>/{mu,nu,…}/params/W              optimizer/opt_state/<i>/{mu,nu,…}/W
  opt_state/<i>/count, …                        optimizer/opt_state/<i>/count, …
  step                            int32         optimizer/step                          uint32
  nnx_aux/model/…                               model/…         RNG streams, batch statistics, other Variables
  params/<other collection>/W                   linen_aux/params/<other collection>/W

`W` is a weight's path inside the model, such as `decoder/layers/mlp/wi_0/kernel`. An NNX leaf may be boxed:
`kernel/value`. A chain of optimizers is a list in Linen, with None for an empty state; in NNX it is a dict keyed by the
index, and an empty state is absent. `linen_aux` is this converter's own: NNX has no collections.

A stack of layers is scanned (`decoder/layers/W`, one leaf with a layer axis), flat (`decoder/layers_<n>/W`) or nested
(`decoder/layers/<n>/W`). A Param has its layer axis at `param_scan_axis`, or last where its rank is too small; any other
variable has it first.

From the command line: `python -m maxtext.checkpoint_conversion.linen_nnx_converter --help`.
"""

from etils import epy

__version__ = "0.2.0"

# Imported when they are used: `--help` and an import of this package need neither JAX nor Orbax.
with epy.lazy_api_imports(globals()):
  # pylint: disable=g-importing-member
  from maxtext.checkpoint_conversion.linen_nnx_converter.__main__ import main
  from maxtext.checkpoint_conversion.linen_nnx_converter.verification.verify import verify_checkpoint
  from maxtext.checkpoint_conversion.linen_nnx_converter.conversion import convert_checkpoint
  from maxtext.checkpoint_conversion.linen_nnx_converter.api import convert_linen_to_nnx
  from maxtext.checkpoint_conversion.linen_nnx_converter.api import convert_nnx_to_linen
  from maxtext.checkpoint_conversion.linen_nnx_converter.api import detect_format
  from maxtext.checkpoint_conversion.linen_nnx_converter.storage.loading import load_checkpoint
  from maxtext.checkpoint_conversion.linen_nnx_converter.storage.loading import save_checkpoint
  from maxtext.checkpoint_conversion.linen_nnx_converter.errors import ConversionError
