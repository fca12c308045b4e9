// Runs the norm of rows (rows.cu) or of heads (rotation.cu, at position 0) on the host:
//
//     norms rows|heads COUNT EPS < COUNT ROWS OF HIDDEN, OR HEADS OF HEAD_DIM, FLOATS > THE SAME
//
// All weights are 1.
#include "warps.h"

#include <cstdio>
#include <cstdlib>

struct F32 {
  float value;
  static float to_float(F32 x) { return x.value; }
  static F32 from_float(float x) { return F32{x}; }
};
using BF16 = F32;
using F16 = F32;

inline void sincosf(float x, float* sin, float* cos) { *sin = std::sin(x), *cos = std::cos(x); }

#include "dependent.cuh"
#include "reduce.cuh"
#include "sequences.cuh"
#include "slabs.cuh"
#include "vector.cuh"

#define __shared__ static
namespace rows {
#include "blocks/rows.cu"
}
namespace heads {
#include "blocks/rotation.cu"
}

int main(int, char** argv) {
  bool is_rows = argv[1][0] == 'r';
  int count = std::atoi(argv[2]), size = is_rows ? HIDDEN : HEAD_DIM;
  float eps = float(std::atof(argv[3]));
  std::vector<float> given(size_t(count) * size), weight(size, 1), out(given.size(), -77777);
  if (std::fread(given.data(), sizeof(float), given.size(), stdin) != given.size()) return 1;
  if (is_rows)
    launch({u32(count), 1, 1}, rows::kThreads, rows::kThreads / kWarp, [] {}, [&] {
      rows::add_norm(given.data(), nullptr, weight.data(), out.data(), nullptr, 0, eps);
    });
  else
    launch({u32(count), 1, 1}, kWarp, 1, [] {}, [&] {
      size_t at = size_t(blockIdx.x) * HEAD_DIM;
      heads::Lane<F32> head(reinterpret_cast<F32*>(given.data() + at));
      heads::norm_and_rotate_head(head, {weight.data(), weight.data()}, 0, eps);
      head.store(reinterpret_cast<F32*>(out.data() + at));
    });
  std::fwrite(out.data(), sizeof(float), out.size(), stdout);
}
