// Measures what the chip does at best: multiply-adds in registers, and reads of memory.

// Every thread runs CHAINS independent chains of fused multiply-adds: 2 * CHAINS * steps operations.
extern "C" __global__ void multiply_add(float* out, int steps, float factor) {
  float sums[CHAINS];
#pragma unroll
  for (int i = 0; i < CHAINS; ++i) sums[i] = threadIdx.x + i;
  for (int step = 0; step < steps; ++step)
#pragma unroll
    for (int i = 0; i < CHAINS; ++i) sums[i] = fmaf(sums[i], factor, factor);
  float total = 0;
#pragma unroll
  for (int i = 0; i < CHAINS; ++i) total += sums[i];
  if (total == 0.123f) *out = total;  // never, but the compiler cannot know
}

// Reads n vectors of 16 bytes.
extern "C" __global__ void read(const float4* in, float* out, int n) {
  float total = 0;
#pragma unroll 8
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    float4 four = in[i];
    total += four.x + four.y + four.z + four.w;
  }
  if (total == 0.123f) *out = total;
}
