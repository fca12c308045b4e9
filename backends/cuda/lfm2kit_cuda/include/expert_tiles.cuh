// The slots and tiles of experts, whose rows lie one expert after the other.
#pragma once
#include "even_tiles.cuh"

constexpr int kAlignment = ALIGNMENT;  // an expert's first slot is a multiple of it, as products want it

// An expert's slots, and its tiles, as few as tile_rows allows.  Those listed together are of a kind: all
// of them, or by height `tall` ones of one and `low` ones of the kind below.
struct ExpertTiles {
  EvenTiles even;
  int slots, kind, tall, low;

  ExpertTiles() = default;
  __device__ ExpertTiles(int rows, int tile_rows, int step, bool by_height)
      : even(even_tiles(rows, (rows + tile_rows - 1) / tile_rows, step)) {
    slots = (rows + kAlignment - 1) / kAlignment * kAlignment;
    kind = by_height ? even.height / step : 0;
    low = by_height ? even.count - even.tall : 0;
    tall = even.count - low;
  }

  // How many are listed before tiles of `kind` of another expert, which this one precedes or not.
  __device__ int listed_before(int its_kind, bool precedes) const {
    return tall * (kind + precedes > its_kind) + low * (kind - 1 + precedes > its_kind);
  }
};

// What comes before an expert's slots, its tall tiles and its low ones; and how many tiles there are in all.
struct Before {
  int slots, tall, low, all_tiles;

  // Counts what expert `other` brings.  Experts with many rows have their tiles first, so that the longest
  // work starts first; among equals, the lower id comes first.  By height, the highest tiles come first: a
  // CTA that takes every nth tile then gets its share of each height.
  __device__ void count(const ExpertTiles& others, int other, const ExpertTiles& its, int expert) {
    int more = others.even.rows - its.even.rows;
    bool precedes = more > 0 || (more == 0 && other < expert);
    slots += other < expert ? others.slots : 0;
    tall += others.listed_before(its.kind, precedes);
    low += others.listed_before(its.kind - 1, precedes);
    all_tiles += others.even.count;
  }
};

// Lists an expert's tiles, with `threads` threads of which this one is number `thread`:
// (expert, first slot, slots, the expert's first tile of the kind | its tiles of the kind << 16) each.
__device__ inline void list_tiles(const ExpertTiles& its, const Before& before, int expert, int4* tiles,
                                  int thread, int threads) {
  for (int i = thread; i < its.even.count; i += threads) {
    bool is_low = i >= its.tall;
    int first = is_low ? before.low : before.tall, of_kind = is_low ? its.low : its.tall;
    tiles[first + i - (is_low ? its.tall : 0)] =
        make_int4(expert, before.slots + its.even.first_row(i), its.even.rows_of(i),
                  first | of_kind << 16);
  }
}
