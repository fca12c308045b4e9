// out = A @ W in float32, one fused multiply-add per term.  The terms of an output element are
// kGroups chains, each over its own stretch of k, added in their order: the same whatever the tile.
// So its bits depend neither on the batch nor on the heights of tiles.
//
//   a_panels  a panel for each tile of rows, made by `arrange` in panels.cu: k, rows
//   w_gpkc    matrices packed by `transpose` in packing.cu: groups, panels of 128 columns (padded
//             with zeros), k, columns
//   tiles     (group, first row, rows, the group's first tile | its tiles << 16); without a list,
//             kHeight rows each, group 0
//
// A block has a multiprocessor to itself, and all of it works on one tile of kHeight rows x 128
// columns: two warps for each stretch of k, side by side, a thread summing kRows x 8 outputs.  Tiles
// are small, and there are many: with few rows, what counts is that all multiprocessors are busy to
// the end.  Blocks go from tile to tile, and the copies of the next one's first stages run while
// the sums of this one are added and stored.
//
// The height is a constant of the compilation, and with SHORT a tile with few rows takes a loop of
// its own: it sums in the same registers.  With sums of their own, or with a loop for every height,
// the compiler allots registers worse.
//
// A scheduler starts one multiplication per cycle only if two of its operands come from different
// banks of registers and the third is kept from the one before.  Hence the multiplications go to
// and fro over the columns; hence too that four sums are stored as (1, 0, 3, 2): as they are, they
// would have to lie in the banks of the weights that they meet.
#include "shared_memory.cuh"
#include "stages.cuh"

constexpr int kRows = ROWS, kHeight = 4 * kRows;  // of a thread, of a tile
constexpr int kShort = SHORT && kRows > 4 ? (kRows - 1) / 4 * 4 : kRows;  // in a low tile
constexpr int kTileK = TILE_K, kStages = 2, kGroups = 6, kWarps = 2;  // warps of a group
constexpr int kGroupThreads = 32 * kWarps, kThreads = kGroups * kGroupThreads;
constexpr int kColumns = 8, kTileN = kWarps * 64;
constexpr int kPass = PASS;              // rows of a thread whose sums are added at once
constexpr int kPassRow = kTileN + 4;     // in floats: puts rows in different banks
constexpr int kStageW = kTileK * kTileN;

using Ring = Stages<kStages, kStageW, kTileK * kHeight, kGroupThreads>;
constexpr int kRings = kGroups * kStages * Ring::kFloats;

extern __shared__ __align__(128) float shared[];  // the rings' stages, then sums

struct Tile {
  int group, row, rows, column, panel;
};

// What a thread multiplies for one k; 4 x 8 threads per warp.  Its rows are four in a row of every
// sixteen, but the last two of ten or six are two in a row of eight.
struct Fragment {
  float a[kRows], w[kColumns];
};

// Where a thread's part of a stage begins.
struct Lane {
  u32 w, a, last_two;

  __device__ __forceinline__ Lane() {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kWarps;
    w = 4 * (warp * 64 + lane % 8 * 4);
    a = 4 * (kStageW + lane / 8 * 4);
    last_two = a - lane / 8 * 8;
    asm volatile("" : "+r"(w), "+r"(a), "+r"(last_two));  // or they are computed in every stage
  }
};

template <int kCount>
__device__ __forceinline__ void read(Fragment& fragment, const Lane& lane, u32 stage, int k) {
  u32 w = stage + lane.w + 4 * k * kTileN, a = stage + lane.a + 4 * k * kHeight;
#pragma unroll
  for (int i = 0; i + 4 <= kCount; i += 4) read_four(fragment.a + i, a + 16 * i);
  if constexpr (kCount % 4 == 2)
    read_two(fragment.a + kCount - 2, stage + lane.last_two + 4 * k * kHeight + 16 * (kCount - 2));
#pragma unroll
  for (int i = 0; i < kColumns; i += 4) read_four(fragment.w + i, w + 32 * i);
}

template <int kCount>
__device__ __forceinline__ void multiply(const Fragment& fragment, float (&acc)[kRows][kColumns]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      int n = i % 2 ? kColumns - 1 - j : j;
      acc[i][n] = fmaf(fragment.a[i], fragment.w[n], acc[i][n]);
    }
}

// Sums this group's `steps` stages in the first kCount rows of `acc`; the next k's fragment is read
// while this one's is multiplied.
template <int kCount>
__device__ __forceinline__ void run(Ring& ring, const Lane& lane, int steps,
                                    float (&acc)[kRows][kColumns]) {
  Fragment fragments[2];
  if (steps > 0) {
    ring.wait();
    read<kCount>(fragments[0], lane, ring.address(), 0);
  }
#pragma unroll 1
  for (int left = steps; left > 0; --left) {
#pragma unroll
    for (int k = 0; k < kTileK - 1; ++k) {
      if (k == 1) ring.refill();
      read<kCount>(fragments[(k + 1) % 2], lane, ring.address(), k + 1);
      multiply<kCount>(fragments[k % 2], acc);
    }
    u32 done = ring.next();
    if (left > 1) {
      ring.wait();
      read<kCount>(fragments[0], lane, ring.address(), 0);
    }
    ring.release(done);
    multiply<kCount>(fragments[1], acc);
  }
}

__device__ __forceinline__ float4 total(const float* from, int pass_rows) {
  float4 sum = *reinterpret_cast<const float4*>(from);
#pragma unroll
  for (int group = 1; group < kGroups; ++group) {
    float4 v = *reinterpret_cast<const float4*>(from + group * pass_rows * kPassRow);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  return make_float4(sum.y, sum.x, sum.w, sum.z);
}

// The row in the tile of row `i` of the threads `at` of 4, or -1 where the tile has none.
__device__ __forceinline__ int row_in_tile(int at, int i) {
  int in_four = i % 4, first = i - in_four, left = kRows - first;  // rows of a thread from there
  if (left >= 4) return 4 * first + 4 * at + in_four;
  return in_four < left ? 4 * first + 2 * at + in_four : -1;
}

// Adds the groups' sums, kPass rows of each thread at a time, and has them stored.
template <class Epilogue>
__device__ __forceinline__ void reduce(const float (&acc)[kRows][kColumns], const Tile& tile) {
  constexpr int kPairs = kTileN / 8, kPassRows = 4 * kPass;
  constexpr bool kDown = Epilogue::kDown;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kWarps;
  int group = threadIdx.x / kGroupThreads;
  float *sums = shared + kRings,
        *mine = sums + (group * kPassRows + lane / 8 * kPass) * kPassRow + warp * 64 + lane % 8 * 4;
#pragma unroll
  for (int i0 = 0; i0 < kRows; i0 += kPass) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPass && i0 + i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; j += 4) {
        const float* v = acc[i0 + i] + j;
        *reinterpret_cast<float4*>(mine + i * kPassRow + 8 * j) =
            make_float4(v[1], v[0], v[3], v[2]);
      }
    __syncthreads();
    for (int q = threadIdx.x; q < kPassRows * kPairs; q += kThreads) {
      int r = kDown ? q % kPassRows : q / kPairs, pair = kDown ? q / kPassRows : q % kPairs;
      int row = row_in_tile(r / kPass, i0 + r % kPass);
      if (row < 0) continue;
      int column = pair / 8 * 64 + pair % 8 * 4;
      const float* from = sums + r * kPassRow + column;
      Epilogue::store(tile, row, column, total(from, kPassRows), total(from + 32, kPassRows));
    }
  }
}

// What a kernel multiplies, and where the results go.
struct Operands {
  const float *a_panels, *w_gpkc, *bias_n;
  float* out;
  const int4* tiles;
  const int* tile_count;
  int m, k, width, n;

  __device__ int count() const { return tiles ? *tile_count : (m + kHeight - 1) / kHeight; }

  // In the order in which blocks take them: the tiles of one group that share a panel of W follow
  // each other.
  __device__ Tile tile(int unit) const {
    int columns = width / kTileN;
    if (!tiles) {
      int many = count(), panel = unit % many, row = panel * kHeight;
      return {0, row, min(kHeight, m - row), unit / many * kTileN, panel};
    }
    int range = tiles[unit / columns].w, first = range & 0xffff, many = range >> 16;
    int in_group = unit - first * columns, panel = first + in_group % many;
    int4 listed = tiles[panel];
    return {listed.x, listed.y, listed.z, in_group / many * kTileN, panel};
  }

  // The stages in a group's stretch of k.
  __device__ int first_step(int group) const { return k / kTileK * group / kGroups; }
  __device__ int steps(int group) const { return first_step(group + 1) - first_step(group); }

  __device__ Ring::Source source(const Tile& tile, int group) const {
    size_t from = first_step(group) * kTileK;
    const float* w_kc = w_gpkc + (size_t(tile.group) * width + tile.column) * k;
    const float* a_kr = a_panels + size_t(tile.panel) * kHeight * k;
    return {w_kc + from * kTileN, a_kr + from * kHeight, steps(group)};
  }
};

// What the threads of a block have in common, besides stages and sums.
__shared__ struct {
  Operands operands;
  int units;
  Tile tiles[2];  // at work on, and next
  Ring::Shared rings[kGroups];
} block;

// Starts the copies of a tile, and leaves in `tile` which it is.
__device__ __forceinline__ void start(Ring& ring, int unit, Tile& to) {
  Tile tile = block.operands.tile(unit);
  if (threadIdx.x == 0) to = tile;
  ring.start(block.operands.source(tile, uniform(threadIdx.x / kGroupThreads)));
}

// The tile that was started, and the start of the next.
template <class Epilogue>
__device__ __forceinline__ void compute_tile(Ring& ring, const Lane& lane, int turn,
                                             int next) {
  float acc[kRows][kColumns] = {};
  int steps = block.operands.steps(uniform(threadIdx.x / kGroupThreads));
  if (kRows == kShort || block.tiles[turn].rows > 4 * kShort) run<kRows>(ring, lane, steps, acc);
  else run<kShort>(ring, lane, steps, acc);
  if (next < block.units) start(ring, next, block.tiles[turn ^ 1]);
  Tile tile = block.tiles[turn];  // a copy: others may have gone on to the tile after the next
  reduce<Epilogue>(acc, tile);
}

template <class Epilogue>
__device__ __forceinline__ void compute(const Operands& operands) {
  if (threadIdx.x == 0) {
    block.operands = operands;
    block.units = operands.count() * (operands.width / kTileN);
  }
  Ring::prepare(block.rings);
  __syncthreads();
  Ring ring(shared, block.rings);
  Lane lane;
  if (blockIdx.x < block.units) start(ring, blockIdx.x, block.tiles[0]);
  __syncthreads();
#pragma unroll 1
  for (int unit = blockIdx.x, turn = 0; unit < block.units; unit += gridDim.x, turn ^= 1)
    compute_tile<Epilogue>(ring, lane, turn, unit + gridDim.x);
}

// out_mn = A @ W + bias_n (null for none)
struct Linear {
  static constexpr bool kDown = false;  // neighbouring threads have neighbouring columns

  // A row and a column of the tile, and two fours, the second 32 columns to the right.
  static __device__ __forceinline__ void store(const Tile& tile, int row, int column, float4 first,
                                               float4 second) {
    if (row >= tile.rows) return;
    int n = block.operands.n, c = tile.column + column;
    float* out_n = block.operands.out + size_t(tile.row + row) * n;
    store_four(out_n, c, n, first);
    store_four(out_n, c + 32, n, second);
  }

  static __device__ __forceinline__ void store_four(float* out_n, int column, int n, float4 v) {
    const float* bias_n = block.operands.bias_n;
    if (n % 4 == 0 && column < n) {
      float4 bias = bias_n ? *reinterpret_cast<const float4*>(bias_n + column) : float4{};
      *reinterpret_cast<float4*>(out_n + column) =
          make_float4(v.x + bias.x, v.y + bias.y, v.z + bias.z, v.w + bias.w);
      return;
    }
    const float values[] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (column + i < n) out_n[column + i] = values[i] + (bias_n ? bias_n[column + i] : 0);
  }
};

// silu(A @ w1) * (A @ w3), in panels of the same tiles, whose k are the first n columns; W has 32
// columns of w1, then 32 of w3, and so on.
struct Gated {
  static constexpr bool kDown = true;  // neighbouring threads have neighbouring rows

  static __device__ __forceinline__ void store(const Tile& tile, int row, int column, float4 gate,
                                               float4 up) {
    int n = block.operands.n;
    int c = (tile.column + column) / 64 * 32 + column % 64;
    float* out = block.operands.out + (size_t(tile.panel) * n + c) * kHeight + row;
    const float gates[] = {gate.x, gate.y, gate.z, gate.w}, ups[] = {up.x, up.y, up.z, up.w};
    // Not `/`, whose rare cases are a call: with one in it, the whole kernel takes half as long again.
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (c + i < n) out[i * kHeight] = __fdividef(gates[i], 1 + expf(-gates[i])) * ups[i];
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    linear(const float* a_panels, const float* w_gpkc, const float* bias_n, float* out_mn,
           const int4* tiles, const int* tile_count, int m, int k, int width, int n) {
  compute<Linear>({a_panels, w_gpkc, bias_n, out_mn, tiles, tile_count, m, k, width, n});
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    gated(const float* a_panels, const float* w_gpkc, float* out_panels, const int4* tiles,
          const int* tile_count, int m, int k, int width, int n) {
  compute<Gated>(
      {a_panels, w_gpkc, nullptr, out_panels, tiles, tile_count, m, k, width, n});
}
