// Matrix products in register tiles, and operands packed for them. Words of 32 bits hold two
// bfloat16 neighbours along the summed axis, or one float32.

#pragma once

#include "vectors.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// Columns of a register tile: its sums take 24 of 32 registers with AVX512, 12 of 16 with AVX2.
constexpr int kPanel = kLanes == 16 ? 64 : 16;
constexpr int kMostRows = 16;  // of a register tile of any kind
constexpr float kLog2e = 1.44269504088896341f;

#ifdef __AMX_BF16__
// The same numbers, multiplied by AMX: tiles of 16 rows by 16 words.
struct TileBFloat16 : BFloat16 {
    static constexpr int kRows = 16;
    static constexpr int kBlock = 32;  // summed over, rows are words of a whole tile

    // Tiles are part of a thread's state: shaped before use, given back after.
    struct Session {
        Session() {
            alignas(64) static const uint8_t shape[64] = {
                1,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,   // palette 1
                64, 0,  64, 0,  64, 0,  64, 0,  64, 0,  64, 0,  64, 0,  64, 0,   // bytes of a row
                0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
                16, 16, 16, 16, 16, 16, 16, 16,                                   // rows
            };
            _tile_loadconfig(shape);
        }
        ~Session() { _tile_release(); }
    };

    // Whether the kernel lets this process have tiles (Linux 5.16; ARCH_REQ_XCOMP_PERM).
    static bool allowed() {
        static const bool yes = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
        return yes;
    }
};
#endif

// out[kRows][kPanel] = a b over `depth` words, or += with `out` shrunk by a factor a row first.
template <class T, bool kAdd>
inline void tile_product(
    const uint32_t* a, int64_t a_stride, const uint32_t* b, int depth, float* out,
    int64_t out_stride, const float* shrink) {
    constexpr int kRows = T::kRows, kVectors = kPanel / kLanes;
    Floats sums[kRows][kVectors];
    for (int r = 0; r < kRows; r++)
        for (int c = 0; c < kVectors; c++) sums[r][c] = Floats{};
    for (int p = 0; p < depth; p++) {
        Words right[kVectors];
        for (int c = 0; c < kVectors; c++) right[c] = load_words(b + p * kPanel + c * kLanes);
        for (int r = 0; r < kRows; r++) {
            const Words left = all_words(a[r * a_stride + p]);
            for (int c = 0; c < kVectors; c++)
                sums[r][c] = T::add_product(sums[r][c], right[c], left);
        }
    }
    for (int r = 0; r < kRows; r++)
        for (int c = 0; c < kVectors; c++) {
            float* to = out + r * out_stride + c * kLanes;
            // short sums are added to the long one: half the rounding of one long chain
            if (kAdd) sums[r][c] = fmadd(load(to), all(shrink[r]), sums[r][c]);
            store(to, sums[r][c]);
        }
}

#ifdef __AMX_BF16__
template <bool kAdd>
inline void amx_product(
    const uint32_t* a, int64_t a_stride, const uint32_t* b, int depth, float* out,
    int64_t out_stride, const float* shrink) {
    if (kAdd) {
        for (int r = 0; r < TileBFloat16::kRows; r++)
            for (int c = 0; shrink[r] != 1.0f && c < kPanel; c += 16) {
                float* to = out + r * out_stride + c;
                _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_loadu_ps(to), _mm512_set1_ps(shrink[r])));
            }
    }
    asm volatile("" ::: "memory");  // tiles are loaded behind the compiler's back
    const int64_t out_bytes = 4 * out_stride, a_bytes = 4 * a_stride;
    if (kAdd) {
        _tile_loadd(0, out, out_bytes);
        _tile_loadd(1, out + 16, out_bytes);
        _tile_loadd(2, out + 32, out_bytes);
        _tile_loadd(3, out + 48, out_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int p = 0; p < depth; p += 16) {
        const uint32_t* right = b + p * kPanel;
        _tile_loadd(4, a + p, a_bytes);
        _tile_loadd(5, right, 4 * kPanel);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, right + 16, 4 * kPanel);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(7, right + 32, 4 * kPanel);
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, right + 48, 4 * kPanel);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, out, out_bytes);
    _tile_stored(1, out + 16, out_bytes);
    _tile_stored(2, out + 32, out_bytes);
    _tile_stored(3, out + 48, out_bytes);
    asm volatile("" ::: "memory");
}

template <>
inline void tile_product<TileBFloat16, false>(
    const uint32_t* a, int64_t a_stride, const uint32_t* b, int depth, float* out,
    int64_t out_stride, const float* shrink) {
    amx_product<false>(a, a_stride, b, depth, out, out_stride, shrink);
}

template <>
inline void tile_product<TileBFloat16, true>(
    const uint32_t* a, int64_t a_stride, const uint32_t* b, int depth, float* out,
    int64_t out_stride, const float* shrink) {
    amx_product<true>(a, a_stride, b, depth, out, out_stride, shrink);
}
#endif

// Asks for a row before it is read: other heads' lie between a head's, which CPUs don't foresee.
// Measured with AVX2 alone.
inline void fetch_ahead(const void* row, int num_bytes) {
    constexpr int kCacheLine = 64;
    for (int at = 0; kLanes == 8 && at < num_bytes; at += kCacheLine)
        _mm_prefetch((const char*)row + at, _MM_HINT_T0);
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
        if (first + j + 1 < length) fetch_ahead(x + (first + j + 1) * stride, 4 * depth);
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
