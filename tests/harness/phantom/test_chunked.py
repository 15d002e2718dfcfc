"""The memory of a step in chunks, by PyTorch's own allocator."""

from __future__ import annotations

import phantoms
import pytest

pytestmark = phantoms.NEEDED


@pytest.mark.parametrize("offload", [True, False])
def test_a_step_takes_the_memory_of_one_chunk(offload: bool) -> None:
    """Twice as many chunks take the same bytes but for ids, labels and positions, with pages on the host.

    Pages on the device are keys and values in bf16 and their gradients in fp32.
    """
    method = {"name": "chunked", "chunk": 512, "offload": offload}
    cells = (phantoms.cell(method=method, seqlen=passes * 512) for passes in (4, 8))
    few, many = (found.allocated_bytes for found in phantoms.estimated(*cells))
    width = 2 * 64 * (2 + 4) * 2  # keys and values of 64 elements, in two dtypes, in 2 layers
    page = 3 * 8 + (0 if offload else width)
    assert many - few == page * 4 * 512
