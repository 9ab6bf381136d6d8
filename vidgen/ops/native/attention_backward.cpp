// The gradient of attention, from its inputs, output and each row's log-sum-exp.
//
// Weights are computed anew tile by tile (Dao et al. 2022, alg. 4). Scores are taken the other way
// round, keys down and queries across: then weights and their slopes lie as the products for keys
// and values want them, and pairs of their rows as the one for queries does, which is kept turned.
// A head belongs to one thread, so sums have one order.
//
// Axes: H heads (of all batches), Lq queries, Lk keys, d head width.

#include "tiles.h"

namespace {

constexpr int kKeyRows = 192;    // keys of a block
constexpr int kQueryTile = 128;  // queries of a tile
constexpr int kMaxWidth = 512;   // of a head

struct Scratch {
    alignas(64) float scores[kKeyRows * kQueryTile];
    alignas(64) float products[kKeyRows * kQueryTile];
    alignas(64) uint32_t weights[kKeyRows * kQueryTile];
    alignas(64) uint32_t slopes[kKeyRows * kQueryTile];
    alignas(64) uint32_t crossed[kKeyRows * kQueryTile];  // slopes as [panel][words of keys][kPanel]
    alignas(64) uint32_t k[kKeyRows * kMaxWidth], v[kKeyRows * kMaxWidth];
    alignas(64) uint32_t turned[(kMaxWidth + kMostRows) * kKeyRows];  // keys as [d][words of keys]
    alignas(64) float grad_k[kKeyRows * kMaxWidth], grad_v[kKeyRows * kMaxWidth];
    float bias[kKeyRows];
};

// What a head's queries are needed as, and the gradient of theirs.
struct Queries {
    uint32_t *q_across, *grad_across, *q_along, *grad_along;
    float *lse, *delta;  // [padded]; lse in powers of 2
    float* turned;       // [d, padded], the gradient
    int64_t count, padded;
};

template <class T>
using Value = typename T::Value;

constexpr float kOnes[kMostRows] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

template <class T>
void take_queries(Queries& s, const Value<T>* q, int64_t q_stride, const Value<T>* out,
                  int64_t out_stride, const Value<T>* grad, int64_t grad_stride, const float* lse,
                  int d) {
    for (int64_t panel = 0; panel < s.padded / kPanel; panel++) {
        pack_across<T>(q, q_stride, s.count, d, panel, s.q_across);
        pack_across<T>(grad, grad_stride, s.count, d, panel, s.grad_across);
    }
    for (int64_t tile = 0; tile * kQueryTile < s.count; tile++) {
        pack_along<T, kQueryTile>(q, q_stride, s.count, d, tile, s.q_along);
        pack_along<T, kQueryTile>(grad, grad_stride, s.count, d, tile, s.grad_along);
    }
    for (int64_t i = 0; i < s.padded; i++) {
        s.lse[i] = i < s.count ? lse[i] * kLog2e : INFINITY;
        if (i + 1 < s.count) fetch_ahead(out + (i + 1) * out_stride, sizeof(Value<T>) * d);
        Floats sum{};
        for (int c = 0; c < d && i < s.count; c += kLanes)
            sum = fmadd(T::load(out + i * out_stride + c),
                                  T::load(grad + i * grad_stride + c), sum);
        s.delta[i] = sum_lanes(sum);
    }
    memset(s.turned, 0, sizeof(float) * (d + kMostRows) * s.padded);
}

template <class T>
void take_keys(Scratch& s, const Value<T>* k, int64_t k_stride, const Value<T>* v,
               int64_t v_stride, const float* bias, int rows, int padded, int d) {
    const int depth = d / T::kPerWord, words = padded / T::kPerWord;
    for (int r = 0; r < padded; r++) {
        if (r < rows) {
            memcpy(s.k + r * depth, k + r * k_stride, 4 * depth);
            memcpy(s.v + r * depth, v + r * v_stride, 4 * depth);
        } else {
            memset(s.k + r * depth, 0, 4 * depth);
            memset(s.v + r * depth, 0, 4 * depth);
        }
        s.bias[r] = r >= rows ? -INFINITY : bias ? bias[r] * kLog2e : 0.0f;
    }
    for (int w = 0; w < words; w++) {
        const int r = w * T::kPerWord;
        const Value<T>*upper = k + r * k_stride, *lower = r + 1 < rows ? upper + k_stride : nullptr;
        for (int c = 0; c < d; c++)
            s.turned[c * words + w] = r < rows ? T::word(upper + c, lower ? lower + c : nullptr) : 0u;
    }
    memset(s.turned + d * words, 0, sizeof(uint32_t) * kMostRows * words);
    memset(s.grad_k, 0, sizeof(float) * padded * d);
    memset(s.grad_v, 0, sizeof(float) * padded * d);
}

// Scores and products to weights and slopes: p = 2^(score * scale + bias - lse), the slope
// p * (product - delta) * scale.
template <class T>
void slope(Scratch& s, const Queries& queries, int64_t first, int rows, int columns, float scale) {
    const Floats by = all(scale * kLog2e), times = all(scale);
    const int words = rows / T::kPerWord;
    for (int w = 0; w < words; w++)
        for (int c = 0; c < columns; c += kLanes) {
            const Floats lse = load_unaligned(queries.lse + first + c);
            const Floats delta = load_unaligned(queries.delta + first + c);
            Floats pair[T::kPerWord];
            for (int i = 0; i < T::kPerWord; i++) {
                const int r = w * T::kPerWord + i, at = r * kQueryTile + c;
                const Floats origin = all(s.bias[r]) - lse;
                const Floats p = exp2_of(fmadd(load(s.scores + at), by, origin));
                pair[i] = p * times * (load(s.products + at) - delta);
                T::store((Value<T>*)(s.weights + r * kQueryTile) + c, p);
                T::store((Value<T>*)(s.slopes + r * kQueryTile) + c, pair[i]);
            }
            const int panel = c / kPanel;
            store_words(s.crossed + (panel * words + w) * kPanel + c % kPanel, T::words(pair));
        }
}

template <class T>
void walk_queries(Scratch& s, const Queries& queries, int rows, int d, float scale) {
    constexpr int kRows = T::kRows;
    const int depth = d / T::kPerWord, words = rows / T::kPerWord, groups = rows / kRows;
    for (int64_t first = 0; first < queries.padded; first += kQueryTile) {
        const int columns = (int)std::min<int64_t>(kQueryTile, queries.padded - first);
        for (int c = 0; c < columns; c += kPanel) {
            const uint32_t* q = queries.q_across + (first + c) * depth;
            const uint32_t* grad = queries.grad_across + (first + c) * depth;
            for (int g = 0; g < groups; g++) {
                const int64_t at = g * kRows * kQueryTile + c;
                tile_product<T, false>(s.k + g * kRows * depth, depth, q, depth, s.scores + at,
                                       kQueryTile, nullptr);
                tile_product<T, false>(s.v + g * kRows * depth, depth, grad, depth,
                                       s.products + at, kQueryTile, nullptr);
            }
        }
        slope<T>(s, queries, first, rows, columns, scale);
        const int64_t tile = first / T::kPerWord * d;
        for (int column = 0; column < d; column += kPanel) {
            const int64_t right = tile + column * (kQueryTile / T::kPerWord);
            for (int g = 0; g < groups; g++) {
                const int64_t to = g * kRows * d + column, left = g * kRows * kQueryTile;
                tile_product<T, true>(s.weights + left, kQueryTile, queries.grad_along + right,
                                      columns / T::kPerWord, s.grad_v + to, d, kOnes);
                tile_product<T, true>(s.slopes + left, kQueryTile, queries.q_along + right,
                                      columns / T::kPerWord, s.grad_k + to, d, kOnes);
            }
        }
        for (int c = 0; c < columns; c += kPanel)
            for (int row = 0; row < d; row += kRows)
                tile_product<T, true>(s.turned + row * words, words, s.crossed + c * words, words,
                                      queries.turned + row * queries.padded + first + c,
                                      queries.padded, kOnes);
    }
}

template <class T>
void store_rows(const float* from, Value<T>* to, int64_t stride, int rows, int d) {
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < d; c += kLanes)
            T::store(to + r * stride + c, load(from + r * d + c));
}

// The gradient of the queries, turned back 16 rows at a time.
template <class T>
void store_queries(const Queries& queries, Value<T>* to, int64_t stride, int d) {
    alignas(64) float rows[16 * kMaxWidth];
    for (int64_t first = 0; first < queries.count; first += 16) {
        for (int c = 0; c < d; c++)
            for (int r = 0; r < 16; r++) rows[r * d + c] = queries.turned[c * queries.padded + first + r];
        const int count = (int)std::min<int64_t>(16, queries.count - first);
        store_rows<T>(rows, to + first * stride, stride, count, d);
    }
}

// q, k, v, out, grad (of out), and the gradients of q, k, v: pointers and strides in this order.
template <class T>
int attend_backward(const Value<T>* const* inputs, Value<T>* const* grads, const float* bias,
                    const float* lse, int64_t batch, int64_t heads, int64_t num_queries,
                    int64_t num_keys, int64_t d, const int64_t* strides, float scale,
                    int64_t threads) {
    const int64_t padded = (num_queries + kPanel - 1) / kPanel * kPanel;
    // the last tile is packed whole
    const int64_t words = (padded + kQueryTile) * (d / T::kPerWord);
    const int64_t own = 4 * words + 2 * padded + (d + kMostRows) * padded;
    const int64_t bytes = (own * 4 + 63) / 64 * 64;
    char* memory = (char*)aligned_alloc(64, bytes * threads);
    Scratch* scratch = (Scratch*)aligned_alloc(64, sizeof(Scratch) * threads);
    const bool ready = memory && scratch;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (ready)
    for (int64_t head = 0; head < batch * heads; head++) {
        if (!ready) continue;
        const typename T::Session session;
        Scratch& s = scratch[omp_get_thread_num()];
        uint32_t* mine = (uint32_t*)(memory + bytes * omp_get_thread_num());
        float* floats = (float*)(mine + 4 * words);
        Queries queries = {mine, mine + words, mine + 2 * words, mine + 3 * words,
                           floats, floats + padded, floats + 2 * padded, num_queries, padded};
        const int64_t b = head / heads, h = head % heads;
        const Value<T>* at[5];
        for (int i = 0; i < 5; i++)
            at[i] = inputs[i] + b * strides[3 * i] + h * strides[3 * i + 1];
        Value<T>* to[3];
        for (int i = 0; i < 3; i++)
            to[i] = grads[i] + b * strides[15 + 3 * i] + h * strides[16 + 3 * i];
        take_queries<T>(queries, at[0], strides[2], at[3], strides[11], at[4], strides[14],
                        lse + head * num_queries, (int)d);
        for (int64_t first = 0; first < num_keys; first += kKeyRows) {
            const int rows = (int)std::min<int64_t>(kKeyRows, num_keys - first);
            const int whole = (rows + T::kBlock - 1) / T::kBlock * T::kBlock;
            take_keys<T>(s, at[1] + first * strides[5], strides[5], at[2] + first * strides[8],
                         strides[8], bias ? bias + b * num_keys + first : nullptr, rows, whole,
                         (int)d);
            walk_queries<T>(s, queries, whole, (int)d, scale);
            store_rows<T>(s.grad_k, to[1] + first * strides[20], strides[20], rows, (int)d);
            store_rows<T>(s.grad_v, to[2] + first * strides[23], strides[23], rows, (int)d);
        }
        store_queries<T>(queries, to[0], strides[17], (int)d);
    }
    free(memory), free(scratch);
    return !ready;
}

}  // namespace

// Strides count elements: of batch, head and token, of q, k, v, out, grad_out, grad_q, grad_k and
// grad_v in this order. `bias` and `lse` are what the forward kernel took and gave. Gives 0, or 1
// where memory is short.
#define VIDGEN_ATTENTION_BACKWARD(name, Kind, choice)                                            \
    extern "C" int name(                                                                         \
        const Kind::Value* q, const Kind::Value* k, const Kind::Value* v, const Kind::Value* out, \
        const Kind::Value* grad, Kind::Value* grad_q, Kind::Value* grad_k, Kind::Value* grad_v,  \
        const float* bias, const float* lse, int64_t batch, int64_t heads, int64_t num_queries,  \
        int64_t num_keys, int64_t d, const int64_t* strides, float scale, int64_t threads) {     \
        const Kind::Value* inputs[] = {q, k, v, out, grad};                                      \
        Kind::Value* grads[] = {grad_q, grad_k, grad_v};                                         \
        auto* run = choice;                                                                      \
        return run(inputs, grads, bias, lse, batch, heads, num_queries, num_keys, d, strides,    \
                   scale, threads);                                                              \
    }

#if defined(__AMX_BF16__)
VIDGEN_ATTENTION_BACKWARD(
    attention_backward_bfloat16, BFloat16,
    TileBFloat16::allowed() ? attend_backward<TileBFloat16> : attend_backward<BFloat16>)
#elif defined(__AVX512BF16__)
VIDGEN_ATTENTION_BACKWARD(attention_backward_bfloat16, BFloat16, attend_backward<BFloat16>)
#endif
VIDGEN_ATTENTION_BACKWARD(attention_backward_float32, Float32, attend_backward<Float32>)
