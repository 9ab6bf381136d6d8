// What the kernels share: a vector of float32 as wide as the CPU's registers, what is done to it,
// and the types of numbers that are read as such and written back.

#pragma once

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>

namespace {

// Lanes of a register: 16 with AVX512, 8 with AVX2. The compilers give `Floats` + - * / by lanes.
// `load` and `store` are for aligned addresses, those of scratch memory.
#ifdef __AVX512F__
constexpr int kLanes = 16;
using Floats = __m512;
using Words = __m512i;
using Mask = __mmask16;

inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* from) { return _mm512_load_ps(from); }
inline Floats load_unaligned(const float* from) { return _mm512_loadu_ps(from); }
inline Floats load_live(const float* from, Mask live) { return _mm512_maskz_loadu_ps(live, from); }
inline void store(float* to, Floats x) { _mm512_store_ps(to, x); }
inline void store_unaligned(float* to, Floats x) { _mm512_storeu_ps(to, x); }
inline void store_live(float* to, Floats x, Mask live) { _mm512_mask_storeu_ps(to, live, x); }

inline Words all_words(uint32_t x) { return _mm512_set1_epi32((int)x); }
inline Words load_words(const uint32_t* from) { return _mm512_load_si512(from); }
inline void store_words(uint32_t* to, Words x) { _mm512_store_si512(to, x); }
inline Floats as_floats(Words x) { return _mm512_castsi512_ps(x); }
inline Words as_words(Floats x) { return _mm512_castps_si512(x); }

inline Floats fmadd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fnmadd(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
inline Floats fmaddsub(Floats a, Floats b, Floats c) { return _mm512_fmaddsub_ps(a, b, c); }
inline Floats fmsubadd(Floats a, Floats b, Floats c) { return _mm512_fmsubadd_ps(a, b, c); }
inline Floats greater(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats magnitude(Floats x) { return _mm512_abs_ps(x); }
inline Floats rounded(Floats x) { return _mm512_roundscale_ps(x, 0); }
inline float sum_lanes(Floats x) { return _mm512_reduce_add_ps(x); }
inline float greatest_lane(Floats x) { return _mm512_reduce_max_ps(x); }

// Of pairs of neighbours: both swapped, the first twice, the second twice.
inline Floats swap_pairs(Floats x) { return _mm512_permute_ps(x, 0xB1); }
inline Floats first_of_pairs(Floats x) { return _mm512_moveldup_ps(x); }
inline Floats second_of_pairs(Floats x) { return _mm512_movehdup_ps(x); }

// x * factor in lanes where `sign` is negative, x elsewhere.
inline Floats times_below_0(Floats x, Floats factor, Floats sign) {
    const Mask below = _mm512_cmp_ps_mask(sign, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mask_mul_ps(x, below, x, factor);
}
// Which lanes from column c on are there in a row of `width`.
inline Mask live_from(int c, int width) {
    return width - c < 16 ? (Mask)((1u << (width - c)) - 1) : (Mask)0xFFFF;
}
// Exponents that `times_power_of_2` takes: 2^-150 is 0. Of two operands max gives the second where
// one is no number, so that NaN stays to be seen.
inline Floats in_range(Floats x) { return _mm512_max_ps(_mm512_set1_ps(-150.0f), x); }
// x * 2^whole.
inline Floats times_power_of_2(Floats x, Floats whole) { return _mm512_scalef_ps(x, whole); }
#else
constexpr int kLanes = 8;
using Floats = __m256;
using Words = __m256i;
using Mask = int;  // how many lanes, from the first on; masked stores are slow on some CPUs

inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Floats load(const float* from) { return _mm256_load_ps(from); }
inline Floats load_unaligned(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Floats x) { _mm256_store_ps(to, x); }
inline void store_unaligned(float* to, Floats x) { _mm256_storeu_ps(to, x); }

inline Words all_words(uint32_t x) { return _mm256_set1_epi32((int)x); }
inline Words load_words(const uint32_t* from) { return _mm256_load_si256((const __m256i*)from); }
inline void store_words(uint32_t* to, Words x) { _mm256_store_si256((__m256i*)to, x); }
inline Floats as_floats(Words x) { return _mm256_castsi256_ps(x); }
inline Words as_words(Floats x) { return _mm256_castps_si256(x); }

inline Floats fmadd(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats fnmadd(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
inline Floats fmaddsub(Floats a, Floats b, Floats c) { return _mm256_fmaddsub_ps(a, b, c); }
inline Floats fmsubadd(Floats a, Floats b, Floats c) { return _mm256_fmsubadd_ps(a, b, c); }
inline Floats greater(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats magnitude(Floats x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline Floats rounded(Floats x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline float sum_lanes(Floats x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
inline float greatest_lane(Floats x) {
    __m128 top = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    top = _mm_max_ps(top, _mm_movehl_ps(top, top));
    return _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
}
inline Floats swap_pairs(Floats x) { return _mm256_permute_ps(x, 0xB1); }
inline Floats first_of_pairs(Floats x) { return _mm256_moveldup_ps(x); }
inline Floats second_of_pairs(Floats x) { return _mm256_movehdup_ps(x); }
inline Floats times_below_0(Floats x, Floats factor, Floats sign) {
    return _mm256_blendv_ps(x, x * factor, sign);
}
inline Mask live_from(int c, int width) { return width - c; }
inline __m256i lanes_below(Mask live) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(live), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Floats load_live(const float* from, Mask live) {
    return live < kLanes ? _mm256_maskload_ps(from, lanes_below(live)) : load_unaligned(from);
}
inline void store_live(float* to, Floats x, Mask live) {
    if (live < kLanes) _mm256_maskstore_ps(to, lanes_below(live), x);
    else store_unaligned(to, x);
}
// The bits of 2^whole are made from whole: those of 2^-127 are 0's, those of 2^128 infinity's.
inline Floats in_range(Floats x) {
    return _mm256_min_ps(_mm256_set1_ps(128.0f), _mm256_max_ps(_mm256_set1_ps(-127.0f), x));
}
inline Floats times_power_of_2(Floats x, Floats whole) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    return x * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
#endif

#ifdef __AVX512BF16__
struct BFloat16 {
    using Value = uint16_t;
    static constexpr int kPerWord = 2;  // of 32 bits
    static constexpr int kRows = 6;     // of a register tile
    static constexpr int kBlock = 6;    // rows come in multiples of this
    struct Session {};                  // what a thread holds while it multiplies

    static Floats load(const Value* from) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static void store(Value* to, Floats x) {
        _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x));
    }
    static Floats load(const Value* from, Mask live) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static void store(Value* to, Floats x, Mask live) {
        _mm256_mask_storeu_epi16(to, live, (__m256i)_mm512_cvtneps_pbh(x));
    }
    // sum + a * b, in float32, of words that hold values along the summed axis
    static Floats add_product(Floats sum, Words a, Words b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    }
    static uint32_t word(const Value* upper, const Value* lower) {
        return *upper | (lower ? (uint32_t)*lower << 16 : 0u);
    }
    // words of 2 vectors' values
    static Words words(const Floats* values) {
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

    static Floats load(const Value* from) { return load_unaligned(from); }
    static void store(Value* to, Floats x) { store_unaligned(to, x); }
    static Floats load(const Value* from, Mask live) { return load_live(from, live); }
    static void store(Value* to, Floats x, Mask live) { store_live(to, x, live); }
    static Floats add_product(Floats sum, Words a, Words b) {
        return fmadd(as_floats(a), as_floats(b), sum);
    }
    static uint32_t word(const Value* value, const Value*) {
        uint32_t bits;
        memcpy(&bits, value, 4);
        return bits;
    }
    static Words words(const Floats* values) { return as_words(values[0]); }
};

// 2^x: a polynomial on the fraction (Cephes' exp2f), off by at most 2e-7 of the value.
inline Floats exp2_of(Floats x) {
    x = in_range(x);
    const Floats whole = rounded(x), t = x - whole;
    Floats y = all(1.535336188319500e-4f);
    y = fmadd(y, t, all(1.339887440266574e-3f));
    y = fmadd(y, t, all(9.618437357674640e-3f));
    y = fmadd(y, t, all(5.550332471162809e-2f));
    y = fmadd(y, t, all(2.402264791363012e-1f));
    y = fmadd(y, t, all(6.931472028550421e-1f));
    y = fmadd(y, t, all(1.0f));
    return times_power_of_2(y, whole);
}

// 1 / (1 + e^-x), by the exponential of what is not positive.
inline Floats sigmoid_of(Floats x) {
    const Floats e = exp2_of(magnitude(x) * all(-1.44269504f));
    return times_below_0(all(1.0f) / (all(1.0f) + e), e, x);
}

}  // namespace
