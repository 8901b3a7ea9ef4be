"""Layout of the pyramid; the phi tables decide parity with released weights."""

import numpy as np
import pytest

from argenseg_jax.scales import SCALES_256, SCALES_512, Scales


@pytest.mark.parametrize(
  ("sides", "phi_index"),
  [
    (SCALES_256, (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)),
    ((1, 2, 3, 4), (0, 1, 2, 3)),
    ((1, 2, 3, 4, 5), (0, 1, 2, 2, 3)),
    ((4,), (0,)),
  ],
)
def test_phi_index_is_the_released_table(sides, phi_index):
  assert Scales(sides).phi_index == phi_index


@pytest.mark.parametrize(
  ("sides", "num_codes"), [(SCALES_256, 680), (SCALES_512, 2240)]
)
def test_codes_of_all_scales_follow_one_another(sides, num_codes):
  scales = Scales(sides)
  assert scales.num_codes == num_codes
  assert scales.latent_side == sides[-1]
  assert scales.offsets[0] == 0
  for k in range(len(scales)):
    start = scales.offsets[k]
    assert (scales.scale_of_code[start : start + sides[k] ** 2] == k).all()
  parts = scales.split(np.arange(2 * num_codes).reshape(2, num_codes))
  assert [p.shape for p in parts] == [(2, s * s) for s in sides]
  np.testing.assert_array_equal(
    np.concatenate(parts, -1)[0], np.arange(num_codes)
  )


@pytest.mark.parametrize("sides", [(), (0, 1), (2, 1), (1, 1, 2)])
def test_sides_that_do_not_grow_are_refused(sides):
  with pytest.raises(ValueError, match="scales"):
    Scales(sides)
