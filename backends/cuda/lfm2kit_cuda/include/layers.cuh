// CTAs in y and z together: a grid has up to 65535 of them in each, and a batch may need more.
// z is a number of layers, each of gridDim.y CTAs; see `in_layers` in launching.py.  The last layer
// may have a few CTAs too many.
#pragma once
#include "types.cuh"

// The number of this CTA, if it lies in this layer.
__device__ inline u32 number_in_layers(u32 layer) { return layer * gridDim.y + blockIdx.y; }
