// Rows cut into tiles as evenly as steps allow: tall ones first, then those a step lower, of which
// the last may lack a few rows.  None is higher than it has to be: ceil(rows / most) tiles have at most
// `most` rows each, if that is a multiple of the step.
#pragma once

struct EvenTiles {
  int rows, count, step;
  int height, tall;  // rows of a tall tile, and how many of them there are

  __device__ int first_row(int i) const { return i * height - max(0, i - tall) * step; }
  __device__ int rows_of(int i) const {
    return min(i < tall ? height : height - step, rows - first_row(i));
  }
};

__device__ inline EvenTiles even_tiles(int rows, int count, int step) {
  int steps = (rows + step - 1) / step, each = count ? (steps + count - 1) / count : 0;
  return {rows, count, step, each * step, count - (count * each - steps)};
}
