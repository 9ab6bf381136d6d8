// Rows of channels in the first-level cache, and tables of vectors that rows share.

#pragma once

#include "vectors.h"

namespace {

constexpr int kMaxWidth = 8192;

// Rows of float32 vectors: row i of the tokens takes row index[i] of the table, or 0 without index.
struct Table {
    const float* values;
    int64_t stride;
    const int32_t* index;

    const float* row(int64_t i) const { return values + (index ? index[i] : 0) * stride; }
};

inline float sum_of(const float* row, int width) {
    Floats total{};
    for (int c = 0; c < width; c += kLanes) total += load(row + c);
    return sum_lanes(total);
}

// Sum of (row - origin)^2.
inline float spread_of(const float* row, int width, float origin) {
    Floats total{};
    for (int c = 0; c < width; c += kLanes) {
        const Floats x = load(row + c) - all(origin);
        total = fmadd(x, x, total);
    }
    return sum_lanes(total);
}

}  // namespace
