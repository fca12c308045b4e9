// Rows of attention: HEADS query heads share KV_HEADS key/value heads, of HEAD_DIM elements.  A row of
// qkv holds all queries, then all keys, then all values.
#pragma once

constexpr int kQueries = HEADS * HEAD_DIM, kKeys = KV_HEADS * HEAD_DIM;
constexpr int kRow = kQueries + 2 * kKeys;
constexpr int kGroup = HEADS / KV_HEADS;
