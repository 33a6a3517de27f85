# SPDX-License-Identifier: Apache-2.0
"""Which numbers the tests of series in files draw, and how many cases of them."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st

ENOUGH = settings(max_examples=80, deadline=None)
NUMBERS = st.floats(-1e6, 1e6, allow_nan=False).map(lambda v: round(v, 6)) | st.just(float("nan"))
