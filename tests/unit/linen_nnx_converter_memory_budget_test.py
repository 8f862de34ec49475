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

"""How a memory budget admits work: by bytes and number, in its order, and a larger piece alone."""

import asyncio
import math

from absl.testing import absltest
from hypothesis import given
from hypothesis import strategies as st
import jax
import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter import memory


class GateTest(absltest.TestCase):

  @given(st.integers(0, 20), st.integers(1, 4), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), max_size=20))
  def test_bytes_and_number_stay_below_their_limits(self, limit, number, work):
    async def run():
      gate, inside, order = memory.Gate(limit, number), [], []

      async def piece(at, nbytes, turns):
        async with gate.inside(nbytes):
          order.append(at)
          inside.append(min(nbytes, limit))
          self.assertLessEqual(sum(inside), limit)
          self.assertLessEqual(len(inside), number)
          for _ in range(turns):
            await asyncio.sleep(0)
          inside.remove(min(nbytes, limit))

      await asyncio.gather(*(piece(at, *each) for at, each in enumerate(work)))
      self.assertEqual(order, list(range(len(work))))

    asyncio.run(run())

  def test_a_failure_and_a_cancellation_give_the_room_back(self):
    async def run():
      gate = memory.Gate(10, 1)
      with self.assertRaisesRegex(ValueError, "failed"):
        async with gate.inside(10):
          waiting = asyncio.create_task(gate.enter(10))
          await asyncio.sleep(0)
          waiting.cancel()
          await asyncio.sleep(0)
          raise ValueError("failed")
      self.assertEqual(await asyncio.wait_for(gate.enter(11), 10), 10)

    asyncio.run(run())


class BudgetTest(absltest.TestCase):

  def test_a_small_leaf_takes_its_own_bytes_and_a_large_one_a_box_or_a_block(self):
    budget = memory.Budget(2**30)
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, np.dtype("float32"))
    self.assertEqual(budget.read_at_once(leaf(2**10, 3), (2**9, 3)), 3 * 2**12)
    self.assertEqual(budget.read_at_once(leaf(2**20, 2**10), (2**10, 2**10)), budget.box)
    block = 2**19, 2**10
    self.assertEqual(budget.read_at_once(leaf(2**20, 2**10), block), 4 * math.prod(block))
    self.assertEqual(budget.read_at_once(leaf(), ()), 4)

  def test_what_keeps_all_cores_busy(self):
    budget, mib = memory.Budget(2**31), 2**20
    self.assertEqual(budget.wanted([]), 0)
    self.assertEqual(budget.wanted([3, 4]), 5 * 7)
    self.assertEqual(budget.wanted([512 * mib] * 1000), 5 * 512 * mib * memory.MOST_BATCHES)
    self.assertEqual(budget.wanted([mib] * 10**6), 5 * memory.BATCH_BYTES * memory.MOST_BATCHES)


if __name__ == "__main__":
  absltest.main()
