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
    __m512 total = _mm512_setzero_ps();
    for (int c = 0; c < width; c += 16) total = _mm512_add_ps(total, _mm512_load_ps(row + c));
    return _mm512_reduce_add_ps(total);
}

// Sum of (row - origin)^2.
inline float spread_of(const float* row, int width, float origin) {
    __m512 total = _mm512_setzero_ps();
    for (int c = 0; c < width; c += 16) {
        const __m512 x = _mm512_sub_ps(_mm512_load_ps(row + c), _mm512_set1_ps(origin));
        total = _mm512_fmadd_ps(x, x, total);
    }
    return _mm512_reduce_add_ps(total);
}

}  // namespace
