"""The model of the caching allocator takes and gives ranges as its source does."""

from __future__ import annotations

from harness.allocator import LARGE_PAGE, MIB, SMALL_PAGE, reserved_bytes


def test_a_freed_range_is_used_again() -> None:
    """Sequential temporaries of one size reserve that size once, in whole pages."""
    changes = [(0, 30 * MIB), (0, 0), (1, 30 * MIB), (1, 0)]
    assert reserved_bytes(changes) == 2 * LARGE_PAGE


def test_a_larger_request_extends_the_free_tail() -> None:
    """Growth starts at the free end of the segment, not behind it."""
    assert reserved_bytes([(0, 40 * MIB), (0, 0), (1, 60 * MIB)]) == 3 * LARGE_PAGE


def test_a_hole_between_live_ranges_stays_reserved() -> None:
    """Fragmentation: a freed range that is too small for the next request is no help."""
    changes = [(0, 40 * MIB), (1, 20 * MIB), (0, 0), (2, 60 * MIB)]
    assert reserved_bytes(changes) == 120 * MIB


def test_best_fit_takes_the_smallest_hole() -> None:
    """A small request leaves the large hole for the large one."""
    changes = [(0, 60 * MIB), (1, 20 * MIB), (2, 20 * MIB), (3, 20 * MIB), (0, 0), (2, 0)]
    assert reserved_bytes([*changes, (4, 20 * MIB), (5, 60 * MIB)]) == 120 * MIB


def test_small_requests_have_a_segment_of_their_own() -> None:
    """Up to 1 MiB they never take a page of 20 MiB."""
    assert reserved_bytes([(0, 512), (1, MIB)]) == SMALL_PAGE
