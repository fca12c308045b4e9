// Rounds rows to 16 bits with the kernels of activations.cu on the host, or places rows that have them:
//
//     activations FORMAT ROWS K PICKED EXTENT THREADS < ARRAYS
//
// FORMAT is BF16 or F16, and ARRAYS are x [ROWS][K], the same rounded already, and the row of which each
// of PICKED rows is one, or -1.  What comes out are the slabs of the rounded rows, those of the placed
// ones, and those of the picked ones, of EXTENT rows each; all are poisoned before.
#include "f32.h"

#include "conversions.h"
#include "halves.h"

#include "activations.cu"

int main(int, char** argv) {
  auto number = [=](int i) { return std::atoi(argv[2 + i]); };
  bool is_half = argv[1][0] == 'F';
  int rows = number(0), k = number(1), picked = number(2), extent = number(3), threads = number(4);
  auto x = read<float>(size_t(rows) * k);
  auto halves = read<u16>(size_t(rows) * k);
  auto source = read<int>(picked);
  auto left = [&](int count, auto kernel) {
    std::vector<uint4> slabs(size_t(padded(k)) * extent / kChunk, uint4{~0u, ~0u, ~0u, ~0u});
    launch({u32(count), 1, 1}, threads, 1, [] {}, [&] { kernel(slabs.data()); });
    write(slabs);
  };
  left(rows, [&](void* at) {
    if (is_half) round_F16(x.data(), static_cast<F16*>(at), k, extent);
    else round_BF16(x.data(), static_cast<BF16*>(at), k, extent);
  });
  std::vector<uint4> aligned(halves.size() * 2 / 16 + 1);
  std::memcpy(aligned.data(), halves.data(), size_t(rows) * k * 2);
  auto* rounded = reinterpret_cast<const u16*>(aligned.data());
  left(rows, [&](void* at) { place_rows(rounded, nullptr, static_cast<u16*>(at), k, extent); });
  left(picked, [&](void* at) { place_rows(rounded, source.data(), static_cast<u16*>(at), k, extent); });
}
