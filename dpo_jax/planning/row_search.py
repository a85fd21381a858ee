"""How many rows fit into a device's memory, by compiling for a few counts."""

from collections.abc import Callable


def largest_rows(
  needs: Callable[[int], int | None], start: int, limit: int, room: int
) -> int:
  """The most rows that fit, by compiling for some of them.

  Memory grows nearly as a line, so that after two that fit the next guess is
  where the line meets `room`; after one that does not, the gap is halved. Up to
  eight rows the answer is exact, beyond to an eighth.

  Args:
    needs: compiles for so many rows and tells the bytes, None if refused.
    start: a first guess.
    limit: more are not tried.
    room: bytes of a device.

  Returns:
    0 where not even one row fits.
  """
  low, high = 0, limit + 1
  sizes: dict[int, int] = {}
  at = min(max(start, 1), limit)
  while low < limit and (high > limit or high - low > max(1, low // 8)):
    size = needs(at)
    if size is None or size > room:
      high = at
      at = (low + high) // 2
      if not at:
        break
      continue
    low, sizes[at] = at, size
    at = min(max(_guess(sizes, room), low + 1), high - 1)
  return low


def _guess(sizes: dict[int, int], room: int) -> int:
  """Where the line through the two largest meets `room`; twice the only one."""
  *_, (fewer, less), (more, most) = [(0, 0), *sorted(sizes.items())]
  if len(sizes) == 1 or most <= less:
    return 2 * more
  return more + int((room - most) * (more - fewer) / (most - less))
