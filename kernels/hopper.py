"""Products of large matrices on Hopper GPUs, one block at a time.

The GPU kernels share this. A thread block takes some rows of `a` and a share of
the rows of `b`, and walks through the blocks of a @ b.T. Three warpgroups
divide the work: one copies slices of both matrices to a ring of buffers in
shared memory (TMA); two multiply (wgmma), each its own half of the rows, and
use every finished block while it is in their registers.

What lies outside the matrices reads as zero (TMA sees to it), so that sizes
need not be multiples of the blocks.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16

DEPTH = 64  # Columns of a slice: 128 bytes, what TMA and wgmma swizzle.
_SHARED = 222 * 2**10  # Bytes of shared memory; the compiler keeps the rest.
_PROCESSORS = 132  # Of the SXM boards.


class Tile(NamedTuple):
  """The block of one multiplying warpgroup; two stand one above the other."""

  rows: int
  columns: int


class Block(NamedTuple):
  """A finished block of a @ b.T."""

  values: Array  # float32 [rows columns]
  first_row: Array
  first_column: Array
  numbers: tuple[Array, ...]  # Those of these rows, [rows].
  scalars: tuple[Array, ...]

  def columns(self) -> Array:
    """int32 [rows columns]: the column of every value."""
    local = lax.broadcasted_iota(jnp.int32, self.values.shape, 1)
    return self.first_column + local

  def rows(self) -> Array:
    """int32 [rows columns]: the row of every value."""
    local = lax.broadcasted_iota(jnp.int32, self.values.shape, 0)
    return self.first_row + local


def across(numbers: Array, like: Array) -> Array:
  """Repeats [rows] along the columns of `like`."""
  return lax.broadcast_in_dim(numbers, like.shape, (0,))


def known(block: Block, columns: int) -> Array:
  """The block's values; -inf from column number `columns` on."""
  if columns % block.values.shape[1] == 0:
    return block.values
  return jnp.where(block.columns() < columns, block.values, -jnp.inf)


def first_best(block: Block, scores: Array) -> tuple[Array, Array]:
  """Each row's highest score, and the first column that has it."""
  best = jnp.max(scores, axis=1)
  ids = block.columns()
  beyond = jnp.iinfo(jnp.int32).max
  hits = jnp.where(scores == across(best, scores), ids, beyond)
  return best, jnp.min(hits, axis=1)


def reduce_blocks(
  a: BFloat16[Array, "m k"],
  b: BFloat16[Array, "n k"],
  *,
  initial: Callable[[], tuple[Array, ...]],
  step: Callable[[tuple[Array, ...], Block], tuple[Array, ...]],
  outputs: Sequence[Any],
  tile: Tile,
  name: str,
  numbers: Sequence[Array] = (),
  scalars: Array | None = None,
  approximate: bool = True,
) -> list[Array]:
  """Reduces every row of a @ b.T.

  Args:
    a, b: k is a multiple of 64.
    initial: arrays [rows] to begin with.
    step: (arrays, block) -> arrays, for the blocks of a row from left to right.
    outputs: dtype of each of the arrays, all of 4 bytes.
    tile: see `Tile`.
    name: of the kernel.
    numbers: arrays [m] of 4 bytes that a block has with it.
    scalars: int32 [any] that a block has with it.
    approximate: exp and log may be wrong in the last places.

  Returns:
    Arrays [shares m]: one result for each share of the columns, in order.
  """
  m = a.shape[0]

  def body(blocks, out_refs, buffers):
    def one(j, carry):
      return step(carry, blocks.finish(j))

    results = lax.fori_loop(0, blocks.count, one, initial())
    for result, buffer in zip(results, buffers, strict=True):
      buffer[blocks.warpgroup] = result
    plgpu.commit_smem()
    for ref, buffer in zip(out_refs, buffers, strict=True):
      plgpu.copy_smem_to_gmem(
        buffer.at[blocks.warpgroup],
        ref.at[blocks.share, pl.ds(blocks.first_row, tile.rows)],
      )
    plgpu.wait_smem_to_gmem(0)

  vectors = len(numbers) + len(outputs)
  plan = _Plan(a, b, tile, other_bytes=2 * tile.rows * 4 * vectors)
  results = _run(
    body,
    plan,
    numbers,
    scalars,
    out_type=[
      jax.ShapeDtypeStruct((plan.shares, plan.padded_rows), dtype)
      for dtype in outputs
    ],
    buffers=[plgpu.SMEM((2, tile.rows), dtype) for dtype in outputs],
    approximate=approximate,
    name=name,
  )
  return [x[:, :m] for x in results]


def map_blocks(
  a: BFloat16[Array, "m k"],
  b: BFloat16[Array, "n k"],
  *,
  function: Callable[[Block], Array],
  tile: Tile,
  name: str,
  numbers: Sequence[Array] = (),
) -> BFloat16[Array, "m n"]:
  """Stores function(block) in bfloat16 for every block of a @ b.T.

  Args are those of `reduce_blocks`.
  """
  m, n = a.shape[0], b.shape[0]

  def body(blocks, out_refs, buffers):
    (out_ref,), (buffer,) = out_refs, buffers
    buffer = buffer.at[blocks.warpgroup]

    def one(j, _):
      block = blocks.finish(j)
      values = function(block).astype(jnp.bfloat16)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      buffer[...] = values
      plgpu.commit_smem()
      rows = pl.ds(blocks.first_row, tile.rows)
      columns = pl.ds(block.first_column, tile.columns)
      plgpu.copy_smem_to_gmem(buffer, out_ref.at[rows, columns])

    lax.fori_loop(0, blocks.count, one, None)
    plgpu.wait_smem_to_gmem(0)

  row_bytes = 4 * len(numbers) + 2 * tile.columns
  plan = _Plan(a, b, tile, other_bytes=2 * tile.rows * row_bytes)
  (out,) = _run(
    body,
    plan,
    numbers,
    None,
    out_type=[
      jax.ShapeDtypeStruct((plan.padded_rows, plan.padded_columns), "bfloat16")
    ],
    buffers=[_swizzled((2, *tile))],
    approximate=True,
    name=name,
  )
  return out[:m, :n]


def refusal(width: int, dtype: Any) -> str | None:
  """Why Hopper kernels cannot multiply rows of `width`; None if they can."""
  if dtype != jnp.bfloat16:
    return f"it multiplies bfloat16, not {jnp.dtype(dtype)}"
  if width % DEPTH:
    return f"it needs a width that is a multiple of {DEPTH}, not {width}"
  return None


class _Plan:
  """How a product is divided: blocks, and shares of them for thread blocks."""

  def __init__(self, a, b, tile, *, other_bytes):
    self.tile = tile
    # A copy must not be larger than the matrix it copies from.
    self.a = _at_least(a, 2 * tile.rows)
    self.b = _at_least(b, tile.columns)
    self.slices = a.shape[1] // DEPTH
    self.row_blocks = pl.cdiv(self.a.shape[0], 2 * tile.rows)
    self.column_blocks = pl.cdiv(self.b.shape[0], tile.columns)
    self.blocks_per_share = self._blocks_per_share()
    self.shares = pl.cdiv(self.column_blocks, self.blocks_per_share)
    self.padded_rows = self.row_blocks * 2 * tile.rows
    self.padded_columns = self.column_blocks * tile.columns
    slice_bytes = 2 * DEPTH * (2 * tile.rows + tile.columns)
    self.ring = min((_SHARED - other_bytes) // slice_bytes, 8)

  def _blocks_per_share(self):
    """Blocks that a thread block walks through, so that all finish together.

    All processors work at a time; so many rounds of them, so many blocks each.
    Fewer shares win among equals.
    """

    def blocks(shares):
      return pl.cdiv(self.column_blocks, shares)

    def time(shares):
      shares = pl.cdiv(self.column_blocks, blocks(shares))
      rounds = pl.cdiv(self.row_blocks * shares, _PROCESSORS)
      return rounds * blocks(shares)

    return blocks(min(range(1, _PROCESSORS + 1), key=time))


class _Blocks(NamedTuple):
  """What a multiplying warpgroup works on."""

  warpgroup: Array
  share: Array
  first_row: Array
  count: Array  # Of blocks.
  finish: Callable[[Array], Block]  # Computes block j; in order, each once.


def _run(body, plan, numbers, scalars, *, out_type, buffers, approximate, name):
  """Calls body(blocks, out_refs, buffers) in each multiplying warpgroup."""
  tile, ring = plan.tile, plan.ring
  numbers = [_at_least(x, plan.padded_rows) for x in numbers]
  scalars = [] if scalars is None else [scalars]
  num_scalars = scalars[0].size if scalars else 0

  def kernel(a_ref, b_ref, *refs):
    number_refs, refs = refs[: len(numbers)], refs[len(numbers) :]
    scalar_refs, out_refs = refs[: len(scalars)], refs[len(scalars) :]
    share = lax.axis_index("share")
    row = lax.axis_index("rows") * 2 * tile.rows
    first_block = share * plan.blocks_per_share
    count = jnp.minimum(plan.blocks_per_share, plan.column_blocks - first_block)
    total = count * plan.slices

    def scope(a_rings, b_rings, number_buffers, buffers, full, free, ready):
      (a_filled, a_ring), (b_filled, b_ring) = _views(a_rings), _views(b_rings)
      warpgroup = lax.axis_index("warpgroup")

      @pl.when(warpgroup < 2)
      def _():
        plgpu.set_max_registers(232, action="increase")
        first_row = row + warpgroup * tile.rows
        own = [buffer.at[warpgroup] for buffer in number_buffers]
        for ref, buffer in zip(number_refs, own, strict=True):
          here = ref.at[pl.ds(first_row, tile.rows)]
          plgpu.copy_gmem_to_smem(here, buffer, ready.at[warpgroup])
        if own:
          plgpu.barrier_wait(ready.at[warpgroup])
        values = tuple(scalar_refs[0][i] for i in range(num_scalars))
        finish = functools.partial(
          _finish, a_ring, b_ring, full, free, warpgroup, plan
        )

        def block(j):
          return Block(
            values=finish(j),
            first_row=first_row,
            first_column=(first_block + j) * tile.columns,
            numbers=tuple(buffer[...] for buffer in own),
            scalars=values,
          )

        body(
          _Blocks(warpgroup, share, first_row, count, block), out_refs, buffers
        )

      @pl.when(warpgroup == 2)
      def _():
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, total)
        def _(i):
          slot = lax.rem(i, ring)

          @pl.when(i >= ring)
          def _():
            plgpu.barrier_wait(free.at[slot])

          columns = pl.ds(lax.rem(i, plan.slices) * DEPTH, DEPTH)
          block = first_block + lax.div(i, plan.slices)
          b_rows = pl.ds(block * tile.columns, tile.columns)
          for ref, rows, buffer in (
            (a_ref, pl.ds(row, 2 * tile.rows), a_filled),
            (b_ref, b_rows, b_filled),
          ):
            plgpu.copy_gmem_to_smem(
              ref.at[rows, columns], buffer.at[slot], full.at[slot]
            )

        # Nobody may leave while others still signal.
        @pl.loop(jnp.maximum(total - ring, 0), total)
        def _(i):
          plgpu.barrier_wait(free.at[lax.rem(i, ring)])

    pl.run_scoped(
      scope,
      _ring((ring, 2 * tile.rows, DEPTH)),
      _ring((ring, tile.columns, DEPTH)),
      [plgpu.SMEM((2, tile.rows), x.dtype) for x in numbers],
      buffers,
      plgpu.Barrier(num_arrivals=2, num_barriers=ring),
      plgpu.Barrier(num_arrivals=2, num_barriers=ring),
      plgpu.Barrier(num_arrivals=max(len(numbers), 1), num_barriers=2),
      collective_axes="warpgroup",
    )

  kernel.__name__ = name
  return plgpu.kernel(
    kernel,
    out_type=out_type,
    grid=(plan.row_blocks, plan.shares),
    grid_names=("rows", "share"),
    num_threads=3,
    thread_name="warpgroup",
    compiler_params=plgpu.CompilerParams(
      approx_math=approximate,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    ),
  )(plan.a, plan.b, *numbers, *scalars)


def _finish(a_ring, b_ring, full, free, warpgroup, plan, j):
  """Adds up the slices of block j as they arrive."""
  tile, ring, slices = plan.tile, plan.ring, plan.slices
  first = j * slices
  rows = pl.ds(warpgroup * tile.rows, tile.rows)

  def add_up(sum_ref):
    @pl.loop(0, slices)
    def _(i):
      slot = lax.rem(first + i, ring)
      plgpu.barrier_wait(full.at[slot])
      plgpu.wgmma(
        sum_ref,
        a_ring.at[slot, rows],
        b_ring.at[slot].transpose((1, 0)),
      )
      # The previous product is done: its buffers may be filled again.
      plgpu.wgmma_wait(1)

      @pl.when(i > 0)
      def _():
        plgpu.barrier_arrive(free.at[lax.rem(first + i - 1, ring)])

    return sum_ref[...]

  # Public by JAX's documentation; its module forgets to say so.
  accumulator = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
  values = pl.run_scoped(add_up, accumulator(tile, jnp.float32))
  plgpu.barrier_arrive(free.at[lax.rem(first + slices - 1, ring)])
  return values


def _ring(shape):
  """Two views of the same bytes: to copy to, and to multiply from.

  wgmma wants tiles of 8 rows, and a copy to such tiles wants a matrix of a
  multiple of 8 rows. A slice is one tile wide, and then tiles of 8 rows or of
  one row mean the same bytes; so copies use the latter.
  """
  return plgpu.RefUnion(_swizzled(shape, (DEPTH,)), _swizzled(shape))


def _views(ring):
  copied_to, multiplied_from = ring
  return copied_to, multiplied_from


def _swizzled(shape, tiling=(8, DEPTH)):
  tiling = plgpu.TilingTransform(tiling)
  swizzle = plgpu.SwizzleTransform(2 * DEPTH)
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=(tiling, swizzle))


def _at_least(x, rows):
  """Pads [rows ...] with zeros."""
  missing = max(rows - x.shape[0], 0)
  return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
