// What a transformer and a VAE do to rows of channels between products, in one pass over memory.
//
// Rows are read once, kept as float32 in the first-level cache, and written once; every sum is
// float32. Widths are multiples of 16, apart from `norm_and_silu`, which takes any.

#include "rows.h"

namespace {

// sum = x + gate * update, then out = LayerNorm(sum) * (base + scale) + shift; X is the type of x and
// sum, U of update and out. `stats` [rows, 2], or null, gets each row's mean and 1 / deviation.
template <class X, class U>
void add_and_norm(
    const typename X::Value* x, const typename U::Value* update, Table gate, Table scale,
    Table shift, float base, typename X::Value* sum, typename U::Value* out, float* stats,
    int64_t rows, int width, float eps, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        alignas(64) float row[kMaxWidth];
        const float* by = gate.values ? gate.row(i) : nullptr;
        for (int c = 0; c < width; c += kLanes) {
            Floats value = X::load(x + i * width + c);
            if (update) {
                const Floats more = U::load(update + i * width + c);
                value = by ? fmadd(more, load_unaligned(by + c), value) : value + more;
                X::store(sum + i * width + c, value);
                value = X::load(sum + i * width + c);  // the norm sees what is kept
            }
            store(row + c, value);
        }
        if (!out) continue;
        const float mean = sum_of(row, width) / width;
        const float factor = 1.0f / sqrtf(spread_of(row, width, mean) / width + eps);
        if (stats) stats[2 * i] = mean, stats[2 * i + 1] = factor;
        const float *gain = scale.row(i), *offset = shift.row(i);
        for (int c = 0; c < width; c += kLanes) {
            const Floats centred = load(row + c) - all(mean);
            const Floats normed = centred * all(factor);
            const Floats times = load_unaligned(gain + c) + all(base);
            U::store(out + i * width + c, fmadd(normed, times, load_unaligned(offset + c)));
        }
    }
}

// RMSNorm over whole rows, then pairs of neighbours turned by a complex number for each pair of a
// head; `table` [table_rows, d / 2] repeats along the rows, or is null; d is a multiple of 16, too.
template <class T>
void norm_and_turn(
    const typename T::Value* x, const float* weight, const float* table, int64_t table_rows, int d,
    typename T::Value* out, int64_t rows, int width, float eps, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        alignas(64) float row[kMaxWidth];
        for (int c = 0; c < width; c += kLanes) store(row + c, T::load(x + i * width + c));
        const float factor = 1.0f / sqrtf(spread_of(row, width, 0.0f) / width + eps);
        const float* turns = table ? table + i % table_rows * d : nullptr;
        for (int c = 0; c < width; c += kLanes) {
            const Floats scaled = load(row + c) * all(factor);
            Floats value = scaled * load_unaligned(weight + c);
            if (turns) {  // (a + bi)(cos + i sin)
                const Floats turn = load_unaligned(turns + c % d);
                const Floats swapped = swap_pairs(value);
                const Floats crossed = swapped * second_of_pairs(turn);
                value = fmaddsub(value, first_of_pairs(turn), crossed);
            }
            T::store(out + i * width + c, value);
        }
    }
}

// silu(RMSNorm(x) * weight), or without SiLU.
template <class T>
void norm_and_silu(
    const typename T::Value* x, const float* weight, typename T::Value* out, int64_t rows,
    int width, int with_silu, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        alignas(64) float row[kMaxWidth];
        for (int c = 0; c < width; c += kLanes)
            store(row + c, T::load(x + i * width + c, live_from(c, width)));
        const float length = std::max(sqrtf(spread_of(row, width, 0.0f)), 1e-12f);
        const Floats factor = all(sqrtf((float)width) / length);
        for (int c = 0; c < width; c += kLanes) {
            const Mask live = live_from(c, width);
            Floats value = load(row + c) * factor * Float32::load(weight + c, live);
            if (with_silu) value *= sigmoid_of(value);
            T::store(out + i * width + c, value, live);
        }
    }
}

// x * sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3): GELU by tanh (Hendrycks & Gimpel 2016).
// With `grad` instead its gradient. `count` is a multiple of 16.
template <class T>
void gelu(const typename T::Value* x, const typename T::Value* grad, typename T::Value* out,
          int64_t count, int threads) {
    const Floats one = all(1.0f), cube = all(0.044715f);
    const Floats root = all(1.5957691216057308f);  // 2 sqrt(2 / pi)
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += kLanes) {
        const Floats value = T::load(x + i), square = value * value;
        const Floats inner = fmadd(square, cube, one);
        const Floats twice = value * root * inner;
        const Floats e = exp2_of(twice * all(-1.44269504f));
        const Floats share = one / (one + e);
        Floats result = value * share;
        if (grad) {  // share + x share (1 - share) (2 u)'
            const Floats slope = root * fmadd(square, all(3 * 0.044715f), one);
            const Floats rest = result * (one - share);
            result = T::load(grad + i) * fmadd(rest, slope, share);
        }
        T::store(out + i, result);
    }
}

}  // namespace

// All arrays are dense apart from the tables, whose strides count floats. `update`, `gate` and
// `out` may be null: nothing is added, it is added as it is, only the sum is wanted.
#define VIDGEN_ADD_AND_NORM(suffix, X, U)                                                          \
    extern "C" void add_and_norm_##suffix(                                                         \
        const X::Value* x, const U::Value* update, const float* gate, int64_t gate_stride,         \
        const float* scale, int64_t scale_stride, const float* shift, int64_t shift_stride,        \
        const int32_t* index, float base, X::Value* sum, U::Value* out, float* stats,              \
        int64_t rows, int64_t width, float eps, int64_t threads) {                                 \
        add_and_norm<X, U>(x, update, {gate, gate_stride, index}, {scale, scale_stride, index},    \
                           {shift, shift_stride, index}, base, sum, out, stats, rows, width, eps,  \
                           threads);                                                               \
    }

#define VIDGEN_ROWS(suffix, Kind)                                                                  \
    VIDGEN_ADD_AND_NORM(suffix, Kind, Kind)                                                        \
    extern "C" void norm_and_turn_##suffix(                                                        \
        const Kind::Value* x, const float* weight, const float* table, int64_t table_rows,         \
        int64_t d, Kind::Value* out, int64_t rows, int64_t width, float eps, int64_t threads) {    \
        norm_and_turn<Kind>(x, weight, table, table_rows, d, out, rows, width, eps, threads);      \
    }                                                                                              \
    extern "C" void norm_and_silu_##suffix(                                                        \
        const Kind::Value* x, const float* weight, Kind::Value* out, int64_t rows, int64_t width,  \
        int64_t with_silu, int64_t threads) {                                                      \
        norm_and_silu<Kind>(x, weight, out, rows, width, with_silu, threads);                      \
    }                                                                                              \
    extern "C" void gelu_##suffix(                                                                 \
        const Kind::Value* x, const Kind::Value* grad, Kind::Value* out, int64_t count,            \
        int64_t threads) {                                                                         \
        gelu<Kind>(x, grad, out, count, threads);                                                  \
    }

#ifdef __AVX512BF16__
VIDGEN_ROWS(bfloat16, BFloat16)
VIDGEN_ADD_AND_NORM(mixed, Float32, BFloat16)
#endif
VIDGEN_ROWS(float32, Float32)
