// Keys and values of one key head, in tiles of 32 that pass through shared memory as they are stored:
// one after the other (Tiles), or several at once (Spans).  HEAD_DIM elements of type INNER each.
#pragma once
#include "async_copy.cuh"
#include "reduce.cuh"

constexpr int kTile = 32;
constexpr int kThreads = ATTEND_THREADS, kWarps = kThreads / kWarp;  // which share tiles: a CTA
constexpr int kPartKeys = PART_KEYS;  // that are summed on their own
static_assert(kPartKeys % kTile == 0 && kPartKeys <= kTile * kWarp, "a lane for each tile of a part");

// Elements that are read at once: 16 bytes where the size of a head allows it.
constexpr int kPieceBytes = HEAD_DIM * sizeof(INNER) % 16 == 0 ? 16 : 4;
constexpr int kPiece = kPieceBytes / sizeof(INNER), kPieces = HEAD_DIM / kPiece;
static_assert(HEAD_DIM * sizeof(INNER) % 4 == 0, "a copy has words");

struct alignas(kPieceBytes) Piece {
  u32 words[kPieceBytes / 4];
};
struct alignas(kPiece % 4 == 0 ? 16 : 4) WidePiece {
  float of[kPiece];
};

__device__ inline WidePiece widened(const INNER* at) {
  Piece piece = *reinterpret_cast<const Piece*>(at);
  WidePiece wide;
#pragma unroll
  for (int i = 0; i < kPieceBytes / 4; ++i) 
    INNER::widen(piece.words[i], wide.of + i * INNER::kPerWord);
  return wide;
}

// A piece more than a head keeps the keys that lanes read in different banks.
struct alignas(16) Tile {
  INNER keys[kTile][HEAD_DIM + kPiece], values[kTile][HEAD_DIM];
};

// Which pieces of a tile's keys or values this thread copies: `piece`, and those kThreads further on,
// of every kStep-th row from `first` on.
struct Share {
  static constexpr int kStep = kPieces < kThreads ? kThreads / kPieces : 1;

  int first = threadIdx.x % kThreads / kPieces, piece = threadIdx.x % kThreads % kPieces;

  // Starts to copy them from where the first one is.  Rows of the tile beyond `rows` become 0.
  template <int kWidth>
  __device__ void copy(INNER (*to)[kWidth], const INNER* from, size_t stride, int rows) const {
    if (first >= kStep) return;
#pragma unroll
    for (int j = 0; j < kTile; j += kStep)
#pragma unroll
      for (int i = 0; i < kPieces; i += kThreads)
        if (first + j < kTile && piece + i < kPieces)
          copy_async<kPieceBytes>(&to[first + j][(piece + i) * kPiece],
                                  from + j * stride + i * kPiece,
                                  first + j < rows ? kPieceBytes : 0);
  }
};

// The keys and values of one key head, rows `stride` apart.
struct Past {
  const INNER *keys, *values;
  size_t stride;

  __device__ Past from(const Share& share) const {
    size_t offset = share.first * stride + share.piece * kPiece;
    return {keys + offset, values + offset, stride};
  }
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

// The tiles of a part, one after the other: while one is used, the next one is copied.
class Tiles {
 public:
  __device__ Tiles(Tile (&stages)[2], const Past& past, const Pages& pages)
      : stages(stages), past(past.from(share)), pages(pages) {}

  // Starts to copy the keys from `begin` on, up to `end`.
  __device__ void start(int begin, int end) {
    int key0 = begin + threadIdx.x % kWarp * kTile;
    row = key0 < end ? pages.row_of(key0) : 0;
    left = end - begin;
    __syncthreads();  // nobody needs the part before any more
    copy(0);
  }

  // The tile t of the part, after the one before.
  __device__ const Tile& at(int t) {
    wait_copies<0>();
    __syncthreads();
    copy(t + 1);
    return stages[t % 2];
  }

 private:
  __device__ void copy(int t) {
    if (t * kTile < left) {
      Tile& tile = stages[t % 2];
      size_t first = size_t(__shfl_sync(~0u, row, t)) * past.stride;
      share.copy(tile.keys, past.keys + first, past.stride, left - t * kTile);
      share.copy(tile.values, past.values + first, past.stride, left - t * kTile);
    }
    commit_copies();
  }

  Share share;
  Tile* stages;
  Past past;  // from this thread's first piece on
  Pages pages;
  int row;   // lane t of each warp has the row of tile t
  int left;  // keys of the part
};

// Spans of a part, of kTiles tiles that are used together.  Keys and values are copied apart: a span's
// keys while the values before them are used, and its values while its keys are.
template <int kTiles>
class Spans {
 public:
  __device__ Spans(Tile* tiles, const Past& past, const Pages& pages)
      : tiles(tiles), past(past.from(share)), pages(pages) {}

  // From here on copies are of the span that begins at key0; the sequence has `context` keys.  The
  // page's number is not looked at before keys are copied: it may come from far.
  __device__ void seek(int key0, int context) {
    int key = key0 + threadIdx.x % kWarp * kTile, number = key / pages.page_tokens;
    in_page = key - number * pages.page_tokens;
    page = key < context ? pages.numbers[number] : 0;
    left = context - key0;
  }

  __device__ void copy_keys() {
    row = page * pages.page_tokens + in_page;
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
      share.copy(tiles[t].keys, past.keys + offset(t), past.stride, left - t * kTile);
    commit_copies();
  }

  __device__ void copy_values() const {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
      share.copy(tiles[t].values, past.values + offset(t), past.stride, left - t * kTile);
    commit_copies();
  }

  // Waits until what all threads have started to copy is there, and all have come here.
  __device__ void wait() const {
    wait_copies<0>();
    __syncthreads();
  }

 private:
  __device__ size_t offset(int t) const { return size_t(__shfl_sync(~0u, row, t)) * past.stride; }

  Share share;
  Tile* tiles;
  Past past;  // from this thread's first piece on
  Pages pages;
  int page, in_page, row;  // lane t of each warp has those of tile t
  int left;                // keys of the sequence from the span's first on
};
