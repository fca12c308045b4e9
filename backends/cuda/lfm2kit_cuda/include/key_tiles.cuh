// Keys and values of one key head, in tiles of 32 that pass through shared memory as they are stored:
// while one is used, the next ones are copied.  HEAD_DIM elements of type INNER each.
#pragma once
#include "async_copy.cuh"
#include "reduce.cuh"

constexpr int kTile = 32;
constexpr int kPartKeys = PART_KEYS;  // that are summed on their own
static_assert(kPartKeys % kTile == 0 && kPartKeys <= kTile * kWarp, "a lane for each tile of a part");

// Elements that are read at once: 16 bytes where the size of a head allows it.
constexpr int kPieceBytes = HEAD_DIM * sizeof(INNER) % 16 == 0 ? 16 : 4;
constexpr int kPiece = kPieceBytes / sizeof(INNER), kPieces = HEAD_DIM / kPiece;
static_assert(HEAD_DIM * sizeof(INNER) % 4 == 0, "a copy has words");

struct alignas(kPieceBytes) Piece {
  INNER of[kPiece];
};
struct alignas(kPiece % 4 == 0 ? 16 : 4) WidePiece {
  float of[kPiece];
};

__device__ inline WidePiece widened(const INNER* at) {
  Piece piece = *reinterpret_cast<const Piece*>(at);
  WidePiece wide;
#pragma unroll
  for (int i = 0; i < kPiece; ++i) wide.of[i] = INNER::to_float(piece.of[i]);
  return wide;
}

// A piece more than a head keeps the keys that lanes read in different banks.
struct alignas(16) Tile {
  INNER keys[kTile][HEAD_DIM + kPiece], values[kTile][HEAD_DIM];
};

// The keys and values of one key head, rows `stride` apart.
struct Past {
  const INNER *keys, *values;
  size_t stride;
};

// Where a sequence's keys are among all of them: in its pages, or without a state in its own rows.
struct Pages {
  const int* numbers;  // null without a state
  int page_tokens;

  // The row of a tile's first key.  A page holds whole tiles, so the others follow it.
  __device__ int row_of(int key0) const {
    return numbers ? numbers[key0 / page_tokens] * page_tokens + key0 % page_tokens : key0;
  }
};

// The threads that share tiles wait for each other: those of a warp, or of the CTA.
template <int kReaders>
__device__ inline void synchronize_readers() {
  if constexpr (kReaders == kWarp) __syncwarp();
  else __syncthreads();
}

// The tiles of a part, which kReaders threads copy and use together, through kStages stages.
template <int kReaders, int kStages>
class Tiles {
 public:
  static_assert(kStages >= 2, "one is filled while another is used");

  __device__ Tiles(Tile* stages, const Past& past, const Pages& pages)
      : stages(stages), past(past), pages(pages) {}

  // Starts to copy the keys from `begin` on, up to `end`.
  __device__ void start(int begin, int end) {
    int key0 = begin + threadIdx.x % kWarp * kTile;
    row = key0 < end ? pages.row_of(key0) : 0;
    left = end - begin;
    synchronize_readers<kReaders>();  // nobody needs the part before any more
    for (int t = 0; t < kStages - 1; ++t) copy(t);
  }

  // The tile t of the part, after the one before.
  __device__ const Tile& at(int t) {
    wait_copies<kStages - 2>();
    synchronize_readers<kReaders>();
    copy(t + kStages - 1);
    return stages[t % kStages];
  }

 private:
  __device__ void copy(int t) {
    if (t * kTile < left) {
      Tile& tile = stages[t % kStages];
      size_t first = size_t(__shfl_sync(~0u, row, t)) * past.stride;
      int pieces = min(kTile, left - t * kTile) * kPieces;
#pragma unroll
      for (int i0 = 0; i0 < kTile * kPieces; i0 += kReaders) {
        int i = i0 + threadIdx.x % kReaders, j = i / kPieces, d = i % kPieces * kPiece;
        if (i >= pieces) continue;
        copy_async<kPieceBytes>(&tile.keys[j][d], past.keys + first + j * past.stride + d, kPieceBytes);
        copy_async<kPieceBytes>(&tile.values[j][d], past.values + first + j * past.stride + d,
                                kPieceBytes);
      }
    }
    commit_copies();
  }

  Tile* stages;
  Past past;
  Pages pages;
  int row;   // lane t of each warp has the row of tile t
  int left;  // keys of the part
};
