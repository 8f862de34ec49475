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

"""The target is compared with the state of MaxText's own model."""

from absl.testing import absltest
import jax
import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import model_check
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state


class ModelCheckTest(absltest.TestCase):

  def test_differences_are_named(self):
    struct = jax.ShapeDtypeStruct((2,), np.float32)
    state = lambda **leaves: abstract_state.AbstractState({(name, "x"): leaf for name, leaf in leaves.items()})
    model_check.check(state(a=struct, nnx_aux=struct), state(a=struct))
    model_check.check(state(a=struct), state(a=struct, nnx_aux=struct))
    with self.assertRaisesRegex(errors.ConfigError, r"^b/x: expected \(2,\) float32, found nothing .1 leaves differ"):
      model_check.check(state(a=struct), state(a=struct, b=struct))
    with self.assertRaisesRegex(errors.ConfigError, r"^b/x: expected nothing there, .* found \(2,\) float32"):
      model_check.check(state(a=struct, b=struct), state(a=struct))

  def test_floats_that_maxtext_casts_are_noted_and_other_dtypes_are_refused(self):
    state = lambda dtype, *shape: abstract_state.AbstractState({("a", "x"): jax.ShapeDtypeStruct(shape, np.dtype(dtype))})
    (note,) = model_check.check(state("float32", 2), state("bfloat16", 2))
    self.assertEqual(
        note, "MaxText will cast 1 leaves when it loads them, as the config says: a/x is float32, not bfloat16"
    )
    self.assertEmpty(model_check.check(state("float32", 2), state("float32", 2)))
    for found, wanted in (
        (("int32", 2), ("float32", 2)),
        (("uint32", 2), ("int32", 2)),
        (("float32", 3), ("bfloat16", 2)),
    ):
      with self.assertRaisesRegex(errors.ConfigError, "^a/x: expected .*1 leaves differ"):
        model_check.check(state(*found), state(*wanted))


if __name__ == "__main__":
  absltest.main()
