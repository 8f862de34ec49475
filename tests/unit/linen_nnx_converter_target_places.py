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

"""What the tests of targets share: a step to convert, and steps that stand there."""

import linen_nnx_converter_util as util
import numpy as np
import orbax.checkpoint as ocp

LINEN = {"params": {"params": {"decoder": {"norm": {"scale": util.array(4)}}}}, "step": np.int32(5)}
CURSOR = {"cursor": np.int32(1)}


class TargetsTestCase(util.CheckpointTestCase):
  """Has a step `run/4` with its items `items` and `extra`, and a pytree that stands alone, `lone`."""

  def setUp(self):
    super().setUp()
    self.step = self.save_step("run/4", items=LINEN, extra=CURSOR)
    self.lone = self.save("lone", LINEN)

  def save_step(self, name, **items):
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
      args = {item: ocp.args.PyTreeSave(tree) for item, tree in items.items()}
      checkpointer.save(self.tmp / name, args=ocp.args.Composite(**args))
    return self.tmp / name

  def write(self, name):
    (self.tmp / name).parent.mkdir(parents=True, exist_ok=True)
    (self.tmp / name).write_text("mine")
