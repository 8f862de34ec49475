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

"""Says what a checkpoint is, from its metadata: layout, step, weights, optimizer, layers, storage, and who reads it.

From the command line: `python -m maxtext.checkpoint_conversion.linen_nnx_inspector PATH`.
"""

from etils import epy

# Imported when they are used: `--help` and an import of this package need neither JAX nor Orbax.
with epy.lazy_api_imports(globals()):
  # pylint: disable=g-importing-member
  from maxtext.checkpoint_conversion.linen_nnx_inspector.__main__ import main
  from maxtext.checkpoint_conversion.linen_nnx_inspector.inspection import inspect_checkpoint
