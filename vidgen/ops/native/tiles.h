// Matrix products in register tiles, and operands packed for them. Words of 32 bits hold two
// bfloat16 neighbours along the summed axis, or one float32.

#pragma once

#include "vectors.h"

namespace {

constexpr int kRows = 6;    // rows of a register tile; 4 vectors wide, 24 sums in 32 registers
constexpr int kPanel = 64;  // columns of a register tile
constexpr float kLog2e = 1.44269504088896341f;

// out[kRows][kPanel] = a b over `depth` words, or += with `out` shrunk by a factor a row first.
template <class T, bool kAdd>
inline void tile_product(
    const uint32_t* a, int64_t a_stride, const uint32_t* b, int depth, float* out,
    int64_t out_stride, const float* shrink) {
    __m512 sums[kRows][4];
    for (int r = 0; r < kRows; r++)
        for (int c = 0; c < 4; c++) sums[r][c] = _mm512_setzero_ps();
    for (int p = 0; p < depth; p++) {
        __m512i right[4];
        for (int c = 0; c < 4; c++) right[c] = _mm512_load_si512(b + p * kPanel + 16 * c);
        for (int r = 0; r < kRows; r++) {
            const __m512i left = _mm512_set1_epi32((int)a[r * a_stride + p]);
            for (int c = 0; c < 4; c++) sums[r][c] = T::add_product(sums[r][c], right[c], left);
        }
    }
    for (int r = 0; r < kRows; r++)
        for (int c = 0; c < 4; c++) {
            float* to = out + r * out_stride + 16 * c;
            // short sums are added to the long one: half the rounding of one long chain
            if (kAdd)
                sums[r][c] = _mm512_fmadd_ps(_mm512_load_ps(to), _mm512_set1_ps(shrink[r]),
                                             sums[r][c]);
            _mm512_store_ps(to, sums[r][c]);
        }
}

// A panel of kPanel tokens of x [L, d], to be summed across d: [panel][words of d][kPanel]; zeros
// behind the last token.
template <class T>
void pack_across(const typename T::Value* x, int64_t stride, int64_t length, int d, int64_t panel,
                 uint32_t* packed) {
    const int depth = d / T::kPerWord;
    uint32_t* to = packed + panel * depth * kPanel;
    const int64_t first = panel * kPanel;
    const int count = (int)std::min<int64_t>(kPanel, length - first);
    if (count < kPanel) memset(to, 0, sizeof(uint32_t) * depth * kPanel);
    for (int j = 0; j < count; j++) {
        const char* row = (const char*)(x + (first + j) * stride);
        for (int p = 0; p < depth; p++) memcpy(to + p * kPanel + j, row + 4 * p, 4);
    }
}

// A tile of kTile tokens of x [L, d], to be summed along the tokens: [tile][column panel][words of
// tokens][kPanel]; zeros behind the last token.
template <class T, int kTile>
void pack_along(const typename T::Value* x, int64_t stride, int64_t length, int d, int64_t tile,
                uint32_t* packed) {
    constexpr int depth = kTile / T::kPerWord;
    uint32_t* to = packed + tile * depth * d;
    const int64_t left = length - tile * kTile;
    // panels of scores are whole, so words up to the next panel are read
    const int used = (int)std::min<int64_t>(kTile, (left + kPanel - 1) / kPanel * kPanel);
    for (int column = 0; column < d; column += kPanel, to += depth * kPanel) {
        for (int p = 0; p < used / T::kPerWord; p++) {
            const int64_t at = p * T::kPerWord;
            const typename T::Value* row = x + (tile * kTile + at) * stride + column;
            for (int c = 0; c < kPanel; c++)
                to[p * kPanel + c] =
                    at < left ? T::word(row + c, at + 1 < left ? row + stride + c : nullptr) : 0u;
        }
    }
}

}  // namespace
