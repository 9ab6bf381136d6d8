// Gradients of the kernels in rows.cpp. What is summed over rows, the gradients of tables and gains,
// each thread sums for its own stretch of rows; the caller adds the threads' sums.

#include "rows.h"

namespace {

// Gradients of a table's rows: [threads, table rows, width], or null where none is wanted.
struct Sums {
    float* values;
    int64_t thread_stride, row_stride;
    const int32_t* index;

    float* row(int64_t i) const {
        return values + omp_get_thread_num() * thread_stride + (index ? index[i] : 0) * row_stride;
    }
};

inline void add_to(float* sum, __m512 value) {
    _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), value));
}

// Of sum = x + gate * update and out = LayerNorm(sum) * (base + scale) + shift, from the gradients
// of both; either may be null. With h = grad_out * (base + scale) and n the normed row, the norm
// hands back (h - mean(h) - n mean(h n)) / deviation (Ba et al. 2016).
template <class X, class U>
void add_and_norm_backward(
    const typename X::Value* sum, const typename U::Value* update, Table gate, Table scale,
    float base, const float* stats, const typename X::Value* grad_sum,
    const typename U::Value* grad_out, typename X::Value* grad_x, typename U::Value* grad_update,
    Sums to_gate, Sums to_scale, Sums to_shift, int64_t rows, int width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        alignas(64) float row[kMaxWidth], normed[kMaxWidth];
        const int64_t at = i * width;
        float mean = 0, along = 0, factor = 0;
        if (grad_out) {
            const __m512 origin = _mm512_set1_ps(stats[2 * i]);
            factor = stats[2 * i + 1];
            const float* gain = scale.row(i);
            float *scales = to_scale.row(i), *shifts = to_shift.row(i);
            __m512 means = _mm512_setzero_ps(), alongs = means;
            for (int c = 0; c < width; c += 16) {
                const __m512 grad = U::load(grad_out + at + c);
                const __m512 n = _mm512_mul_ps(_mm512_sub_ps(X::load(sum + at + c), origin),
                                               _mm512_set1_ps(factor));
                const __m512 h = _mm512_mul_ps(
                    grad, _mm512_add_ps(_mm512_loadu_ps(gain + c), _mm512_set1_ps(base)));
                add_to(scales + c, _mm512_mul_ps(grad, n));
                add_to(shifts + c, grad);
                means = _mm512_add_ps(means, h);
                alongs = _mm512_fmadd_ps(h, n, alongs);
                _mm512_store_ps(row + c, h);
                _mm512_store_ps(normed + c, n);
            }
            mean = _mm512_reduce_add_ps(means) / width;
            along = _mm512_reduce_add_ps(alongs) / width;
        }
        const float* by = gate.values ? gate.row(i) : nullptr;
        float* gates = by ? to_gate.row(i) : nullptr;
        for (int c = 0; c < width; c += 16) {
            __m512 grad = grad_sum ? X::load(grad_sum + at + c) : _mm512_setzero_ps();
            if (grad_out) {
                __m512 h = _mm512_sub_ps(_mm512_load_ps(row + c), _mm512_set1_ps(mean));
                h = _mm512_fnmadd_ps(_mm512_load_ps(normed + c), _mm512_set1_ps(along), h);
                grad = _mm512_fmadd_ps(h, _mm512_set1_ps(factor), grad);
            }
            X::store(grad_x + at + c, grad);
            if (!update) continue;
            if (by) add_to(gates + c, _mm512_mul_ps(grad, U::load(update + at + c)));
            U::store(grad_update + at + c,
                     by ? _mm512_mul_ps(grad, _mm512_loadu_ps(by + c)) : grad);
        }
    }
}

// Of RMSNorm(x) * weight, turned; `to_weight` [threads, width]. `grad` has heads of d side by side.
template <class T>
void norm_and_turn_backward(
    const typename T::Value* x, const float* weight, const float* table, int64_t table_rows, int d,
    const typename T::Value* grad, typename T::Value* grad_x, float* to_weight, int64_t rows,
    int width, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        alignas(64) float row[kMaxWidth], turned[kMaxWidth];
        float* weights = to_weight + omp_get_thread_num() * (int64_t)width;
        const float* turns = table ? table + i % table_rows * d : nullptr;
        for (int c = 0; c < width; c += 16) _mm512_store_ps(row + c, T::load(x + i * width + c));
        const float factor = 1.0f / sqrtf(spread_of(row, width, 0.0f) / width + eps);
        __m512 alongs = _mm512_setzero_ps();
        for (int c = 0; c < width; c += 16) {
            __m512 value = T::load(grad + i * width + c);
            if (turns) {  // (a + bi)(cos - i sin)
                const __m512 turn = _mm512_loadu_ps(turns + c % d);
                const __m512 swapped = _mm512_permute_ps(value, 0xB1);
                const __m512 crossed = _mm512_mul_ps(swapped, _mm512_movehdup_ps(turn));
                value = _mm512_fmsubadd_ps(value, _mm512_moveldup_ps(turn), crossed);
            }
            const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(row + c), _mm512_set1_ps(factor));
            add_to(weights + c, _mm512_mul_ps(value, scaled));
            value = _mm512_mul_ps(value, _mm512_loadu_ps(weight + c));
            alongs = _mm512_fmadd_ps(value, scaled, alongs);
            _mm512_store_ps(turned + c, value);
        }
        // 1 / rms depends on x, too: its derivative is -x / (rms^3 width)
        const __m512 inner = _mm512_set1_ps(_mm512_reduce_add_ps(alongs) / width * factor);
        for (int c = 0; c < width; c += 16) {
            const __m512 value = _mm512_fnmadd_ps(_mm512_load_ps(row + c), inner,
                                                  _mm512_load_ps(turned + c));
            T::store(grad_x + i * width + c, _mm512_mul_ps(value, _mm512_set1_ps(factor)));
        }
    }
}

// Of silu(RMSNorm(x) * weight); `to_weight` [threads, width].
template <class T>
void norm_and_silu_backward(
    const typename T::Value* x, const float* weight, const typename T::Value* grad,
    typename T::Value* grad_x, float* to_weight, int64_t rows, int width, int threads) {
    const __m512 one = _mm512_set1_ps(1.0f);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        alignas(64) float row[kMaxWidth], scaled[kMaxWidth];
        float* weights = to_weight + omp_get_thread_num() * (int64_t)width;
        for (int c = 0; c < width; c += 16)
            _mm512_store_ps(row + c, T::load(x + i * width + c, live_from(c, width)));
        const float length = std::max(sqrtf(spread_of(row, width, 0.0f)), 1e-12f);
        const __m512 factor = _mm512_set1_ps(sqrtf((float)width) / length);
        __m512 alongs = _mm512_setzero_ps();
        for (int c = 0; c < width; c += 16) {
            const __mmask16 live = live_from(c, width);
            const __m512 normed = _mm512_mul_ps(_mm512_load_ps(row + c), factor);
            const __m512 gain = Float32::load(weight + c, live), value = _mm512_mul_ps(normed, gain);
            const __m512 share = sigmoid_of(value);
            const __m512 rest = _mm512_mul_ps(value, _mm512_sub_ps(one, share));
            const __m512 slope = _mm512_fmadd_ps(share, rest, share);  // of x sigmoid(x)
            const __m512 inner = _mm512_mul_ps(T::load(grad + i * width + c, live), slope);
            const __m512 h = _mm512_mul_ps(inner, gain);
            const __m512 sum = Float32::load(weights + c, live);
            Float32::store(weights + c, _mm512_fmadd_ps(inner, normed, sum), live);
            alongs = _mm512_fmadd_ps(h, normed, alongs);
            _mm512_store_ps(row + c, normed);
            _mm512_store_ps(scaled + c, h);
        }
        const __m512 along = _mm512_set1_ps(_mm512_reduce_add_ps(alongs) / width);
        for (int c = 0; c < width; c += 16) {
            const __m512 h = _mm512_fnmadd_ps(_mm512_load_ps(row + c), along,
                                              _mm512_load_ps(scaled + c));
            T::store(grad_x + i * width + c, _mm512_mul_ps(h, factor), live_from(c, width));
        }
    }
}

}  // namespace

// All arrays are dense apart from the tables, whose strides count floats, as do those of sums.
#define VIDGEN_ADD_AND_NORM_BACKWARD(suffix, X, U)                                                 \
    extern "C" void add_and_norm_backward_##suffix(                                                \
        const X::Value* sum, const U::Value* update, const float* gate, int64_t gate_stride,       \
        const float* scale, int64_t scale_stride, const int32_t* index, float base,                \
        const float* stats, const X::Value* grad_sum, const U::Value* grad_out, X::Value* grad_x,  \
        U::Value* grad_update, float* to_gate, int64_t gate_sums, int64_t gate_row,                \
        float* to_scale, int64_t scale_sums, int64_t scale_row, float* to_shift,                   \
        int64_t shift_sums, int64_t shift_row, int64_t rows, int64_t width, int64_t threads) {     \
        add_and_norm_backward<X, U>(                                                               \
            sum, update, {gate, gate_stride, index}, {scale, scale_stride, index}, base, stats,    \
            grad_sum, grad_out, grad_x, grad_update, {to_gate, gate_sums, gate_row, index},        \
            {to_scale, scale_sums, scale_row, index}, {to_shift, shift_sums, shift_row, index},    \
            rows, width, threads);                                                                 \
    }

#define VIDGEN_ROWS_BACKWARD(suffix, Kind)                                                         \
    VIDGEN_ADD_AND_NORM_BACKWARD(suffix, Kind, Kind)                                               \
    extern "C" void norm_and_turn_backward_##suffix(                                               \
        const Kind::Value* x, const float* weight, const float* table, int64_t table_rows,         \
        int64_t d, const Kind::Value* grad, Kind::Value* grad_x, float* to_weight, int64_t rows,   \
        int64_t width, float eps, int64_t threads) {                                               \
        norm_and_turn_backward<Kind>(x, weight, table, table_rows, d, grad, grad_x, to_weight,     \
                                     rows, width, eps, threads);                                   \
    }                                                                                              \
    extern "C" void norm_and_silu_backward_##suffix(                                               \
        const Kind::Value* x, const float* weight, const Kind::Value* grad, Kind::Value* grad_x,   \
        float* to_weight, int64_t rows, int64_t width, int64_t threads) {                          \
        norm_and_silu_backward<Kind>(x, weight, grad, grad_x, to_weight, rows, width, threads);    \
    }

#ifdef __AVX512BF16__
VIDGEN_ROWS_BACKWARD(bfloat16, BFloat16)
VIDGEN_ADD_AND_NORM_BACKWARD(mixed, Float32, BFloat16)
#endif
VIDGEN_ROWS_BACKWARD(float32, Float32)
