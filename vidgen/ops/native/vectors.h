// What the kernels share: 16 values of a type as float32, and back.

#pragma once

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>

namespace {

#ifdef __AVX512BF16__
struct BFloat16 {
    using Value = uint16_t;
    static constexpr int kPerWord = 2;  // of 32 bits
    static constexpr int kRows = 6;     // of a register tile
    static constexpr int kBlock = 6;    // rows come in multiples of this
    struct Session {};                  // what a thread holds while it multiplies

    static __m512 load(const Value* from) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static void store(Value* to, __m512 x) {
        _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x));
    }
    static __m512 load(const Value* from, __mmask16 live) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static void store(Value* to, __m512 x, __mmask16 live) {
        _mm256_mask_storeu_epi16(to, live, (__m256i)_mm512_cvtneps_pbh(x));
    }
    // sum + a * b, in float32, of words that hold values along the summed axis
    static __m512 add_product(__m512 sum, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    }
    static uint32_t word(const Value* upper, const Value* lower) {
        return *upper | (lower ? (uint32_t)*lower << 16 : 0u);
    }
    // 16 words of 2 vectors' values
    static __m512i words(const __m512* values) {
        const __m512i upper = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values[0]));
        const __m512i lower = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values[1]));
        return _mm512_or_si512(upper, _mm512_slli_epi32(lower, 16));
    }
};
#endif

struct Float32 {
    using Value = float;
    static constexpr int kPerWord = 1;
    static constexpr int kRows = 6;
    static constexpr int kBlock = 6;
    struct Session {};

    static __m512 load(const Value* from) { return _mm512_loadu_ps(from); }
    static void store(Value* to, __m512 x) { _mm512_storeu_ps(to, x); }
    static __m512 load(const Value* from, __mmask16 live) {
        return _mm512_maskz_loadu_ps(live, from);
    }
    static void store(Value* to, __m512 x, __mmask16 live) {
        _mm512_mask_storeu_ps(to, live, x);
    }
    static __m512 add_product(__m512 sum, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }
    static uint32_t word(const Value* value, const Value*) {
        uint32_t bits;
        memcpy(&bits, value, 4);
        return bits;
    }
    static __m512i words(const __m512* values) { return _mm512_castps_si512(values[0]); }
};

// Which of the 16 values from column c on are there in a row of `width`.
inline __mmask16 live_from(int c, int width) {
    return width - c < 16 ? (__mmask16)((1u << (width - c)) - 1) : (__mmask16)0xFFFF;
}

// 2^x for x <= 0: a polynomial on the fraction (Cephes' exp2f), off by at most 2e-7 of the value.
inline __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-150.0f));
    const __m512 whole = _mm512_roundscale_ps(x, 0);
    const __m512 t = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.535336188319500e-4f);
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(1.339887440266574e-3f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(9.618437357674640e-3f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(5.550332471162809e-2f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(2.402264791363012e-1f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(6.931472028550421e-1f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

// 1 / (1 + e^-x), by the exponential of what is not positive.
inline __m512 sigmoid_of(__m512 x) {
    const __m512 e = exp2_of(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-1.44269504f)));
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 share = _mm512_div_ps(one, _mm512_add_ps(one, e));
    const __mmask16 below = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mask_mul_ps(share, below, share, e);
}

}  // namespace
