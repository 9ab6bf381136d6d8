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

inline void add_to(float* sum, Floats value) {
    store_unaligned(sum, load_unaligned(sum) + value);
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
            const Floats origin = all(stats[2 * i]);
            factor = stats[2 * i + 1];
            const float* gain = scale.row(i);
            float *scales = to_scale.row(i), *shifts = to_shift.row(i);
            Floats means{}, alongs{};
            for (int c = 0; c < width; c += kLanes) {
                const Floats grad = U::load(grad_out + at + c);
                const Floats n = (X::load(sum + at + c) - origin) * all(factor);
                const Floats h = grad * (load_unaligned(gain + c) + all(base));
                add_to(scales + c, grad * n);
                add_to(shifts + c, grad);
                means += h;
                alongs = fmadd(h, n, alongs);
                store(row + c, h);
                store(normed + c, n);
            }
            mean = sum_lanes(means) / width;
            along = sum_lanes(alongs) / width;
        }
        const float* by = gate.values ? gate.row(i) : nullptr;
        float* gates = by ? to_gate.row(i) : nullptr;
        for (int c = 0; c < width; c += kLanes) {
            Floats grad = grad_sum ? X::load(grad_sum + at + c) : Floats{};
            if (grad_out) {
                Floats h = load(row + c) - all(mean);
                h = fnmadd(load(normed + c), all(along), h);
                grad = fmadd(h, all(factor), grad);
            }
            X::store(grad_x + at + c, grad);
            if (!update) continue;
            if (by) add_to(gates + c, grad * U::load(update + at + c));
            U::store(grad_update + at + c, by ? grad * load_unaligned(by + c) : grad);
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
        for (int c = 0; c < width; c += kLanes) store(row + c, T::load(x + i * width + c));
        const float factor = 1.0f / sqrtf(spread_of(row, width, 0.0f) / width + eps);
        Floats alongs{};
        for (int c = 0; c < width; c += kLanes) {
            Floats value = T::load(grad + i * width + c);
            if (turns) {  // (a + bi)(cos - i sin)
                const Floats turn = load_unaligned(turns + c % d);
                const Floats swapped = swap_pairs(value);
                const Floats crossed = swapped * second_of_pairs(turn);
                value = fmsubadd(value, first_of_pairs(turn), crossed);
            }
            const Floats scaled = load(row + c) * all(factor);
            add_to(weights + c, value * scaled);
            value = value * load_unaligned(weight + c);
            alongs = fmadd(value, scaled, alongs);
            store(turned + c, value);
        }
        // 1 / rms depends on x, too: its derivative is -x / (rms^3 width)
        const Floats inner = all(sum_lanes(alongs) / width * factor);
        for (int c = 0; c < width; c += kLanes) {
            const Floats value = fnmadd(load(row + c), inner, load(turned + c));
            T::store(grad_x + i * width + c, value * all(factor));
        }
    }
}

// Of silu(RMSNorm(x) * weight); `to_weight` [threads, width].
template <class T>
void norm_and_silu_backward(
    const typename T::Value* x, const float* weight, const typename T::Value* grad,
    typename T::Value* grad_x, float* to_weight, int64_t rows, int width, int threads) {
    const Floats one = all(1.0f);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        alignas(64) float row[kMaxWidth], scaled[kMaxWidth];
        float* weights = to_weight + omp_get_thread_num() * (int64_t)width;
        for (int c = 0; c < width; c += kLanes)
            store(row + c, T::load(x + i * width + c, live_from(c, width)));
        const float length = std::max(sqrtf(spread_of(row, width, 0.0f)), 1e-12f);
        const Floats factor = all(sqrtf((float)width) / length);
        Floats alongs{};
        for (int c = 0; c < width; c += kLanes) {
            const Mask live = live_from(c, width);
            const Floats normed = load(row + c) * factor;
            const Floats gain = Float32::load(weight + c, live), value = normed * gain;
            const Floats share = sigmoid_of(value);
            const Floats rest = value * (one - share);
            const Floats slope = fmadd(share, rest, share);  // of x sigmoid(x)
            const Floats inner = T::load(grad + i * width + c, live) * slope;
            const Floats h = inner * gain;
            const Floats sum = Float32::load(weights + c, live);
            Float32::store(weights + c, fmadd(inner, normed, sum), live);
            alongs = fmadd(h, normed, alongs);
            store(row + c, normed);
            store(scaled + c, h);
        }
        const Floats along = all(sum_lanes(alongs) / width);
        for (int c = 0; c < width; c += kLanes) {
            const Floats h = fnmadd(load(row + c), along, load(scaled + c));
            T::store(grad_x + i * width + c, h * factor, live_from(c, width));
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
