// Attention in bfloat16 or float32, with float32 scores.
//
// A flash attention (Dao et al. 2022, alg. 1): blocks of queries walk over tiles of keys, keep each
// row's maximum and sum, and never hold more scores than a tile. All sums are float32. In bfloat16
// vdpbf16ps multiplies pairs of neighbours, so operands are made of 32-bit words that hold two
// values along the summed axis, in float32 one; weights are rounded to bfloat16 for the second
// product, as in PyTorch's own kernel. Where there is AMX, its tiles multiply the same words.
//
// Axes: H heads (of all batches), Lq queries, Lk keys, d head width.

#include "tiles.h"

namespace {

constexpr int kQueries = 96;     // queries of a block
constexpr int kKeys = 256;       // keys of a tile
constexpr int kMaxWidth = 512;   // of a head
constexpr int64_t kPacked = 16 << 20;  // bytes of keys and values that are packed at a time

struct Scratch {
    alignas(64) uint32_t q[kQueries * kMaxWidth];
    alignas(64) float scores[kQueries * kKeys];
    alignas(64) uint32_t weights[kQueries * kKeys];
    alignas(64) float out[kQueries * kMaxWidth];
    float row_max[kQueries], row_sum[kQueries], shrink[kQueries];
};

// Scores to weights: 2^(score * scale + bias - maximum so far), their sums, and by how much what
// was summed before shrinks. `bias` holds a tile's keys, in powers of 2; -inf hides a key.
template <class T>
void soften(Scratch& s, int rows, int columns, float scale, const float* bias) {
    const Floats by = all(scale);
    for (int r = 0; r < rows; r++) {
        float* scores = s.scores + r * kKeys;
        typename T::Value* weights = (typename T::Value*)(s.weights + r * kKeys);
        Floats top = all(-INFINITY);
        for (int c = 0; c < columns; c += kLanes) {
            const Floats x = fmadd(load(scores + c), by, load_unaligned(bias + c));
            store(scores + c, x);
            top = greater(top, x);
        }
        const float before = s.row_max[r];
        const float now = std::max(before, greatest_lane(top));
        if (now == -INFINITY) {  // nothing to see so far
            memset(weights, 0, sizeof(*weights) * columns);
            s.shrink[r] = 1.0f;
            continue;
        }
        const Floats origin = all(now);
        Floats sum{};
        for (int c = 0; c < columns; c += kLanes) {
            const Floats x = load(scores + c);
            const Floats w = exp2_of(x - origin);
            sum += w;
            T::store(weights + c, w);
        }
        const float shrink = before == -INFINITY ? 0.0f : exp2f(before - now);
        s.shrink[r] = shrink;
        s.row_sum[r] = s.row_sum[r] * shrink + sum_lanes(sum);
        s.row_max[r] = now;
    }
}

template <class T>
void attend_block(
    Scratch& s, const typename T::Value* q, int64_t q_stride, const uint32_t* keys,
    const uint32_t* values, const float* bias, int64_t num_keys, int rows, int d, float scale,
    typename T::Value* out, int64_t out_stride, float* lse) {
    constexpr int kRows = T::kRows;
    const int groups = (rows + kRows - 1) / kRows, depth = d / T::kPerWord;
    for (int r = 0; r < groups * kRows; r++) {
        if (r < rows) memcpy(s.q + r * depth, q + r * q_stride, 4 * depth);
        else memset(s.q + r * depth, 0, 4 * depth);
        s.row_max[r] = -INFINITY;
        s.row_sum[r] = 0.0f;
    }
    memset(s.out, 0, sizeof(float) * groups * kRows * d);
    for (int64_t first = 0; first < num_keys; first += kKeys) {
        const int left = (int)std::min<int64_t>(kKeys, num_keys - first);
        const int panels = (left + kPanel - 1) / kPanel, columns = panels * kPanel;
        const uint32_t* right = keys + first * depth;
        for (int panel = 0; panel < panels; panel++, right += depth * kPanel)
            for (int g = 0; g < groups; g++)
                tile_product<T, false>(
                    s.q + g * kRows * depth, depth, right, depth,
                    s.scores + g * kRows * kKeys + panel * kPanel, kKeys, nullptr);
        soften<T>(s, groups * kRows, columns, scale * kLog2e, bias + first);
        right = values + first / T::kPerWord * d;
        for (int column = 0; column < d; column += kPanel, right += kKeys / T::kPerWord * kPanel)
            for (int g = 0; g < groups; g++)
                tile_product<T, true>(
                    s.weights + g * kRows * kKeys, kKeys, right, columns / T::kPerWord,
                    s.out + g * kRows * d + column, d, s.shrink + g * kRows);
    }
    for (int r = 0; r < rows; r++) {
        const Floats by = all(1.0f / s.row_sum[r]);
        for (int c = 0; c < d; c += kLanes)
            T::store(out + r * out_stride + c, load(s.out + r * d + c) * by);
        if (lse) lse[r] = (s.row_max[r] + log2f(s.row_sum[r])) / kLog2e;
    }
}

template <class T>
int attend(
    const typename T::Value* q, const typename T::Value* k, const typename T::Value* v,
    const float* bias, typename T::Value* out, float* lse, int64_t batch, int64_t heads,
    int64_t num_queries, int64_t num_keys, int64_t d, const int64_t* strides, float scale,
    int64_t threads) {
    const int64_t tiles = (num_keys + kKeys - 1) / kKeys, padded = tiles * kKeys;
    const int64_t panels = (num_keys + kPanel - 1) / kPanel;
    const int64_t blocks = (num_queries + kQueries - 1) / kQueries;
    const int64_t words = padded * (d / T::kPerWord), all = batch * heads;
    const int64_t group = std::max<int64_t>(1, std::min(all, kPacked / (words * 8)));
    uint32_t* keys = (uint32_t*)aligned_alloc(64, sizeof(uint32_t) * words * group);
    uint32_t* values = (uint32_t*)aligned_alloc(64, sizeof(uint32_t) * words * group);
    float* biases = (float*)aligned_alloc(64, sizeof(float) * padded * batch);
    Scratch* scratch = (Scratch*)aligned_alloc(64, sizeof(Scratch) * threads);
    const bool ready = keys && values && biases && scratch;
    const int64_t *sq = strides, *sk = strides + 3, *sv = strides + 6, *so = strides + 9;
    for (int64_t j = 0; ready && j < padded * batch; j++) {
        const int64_t key = j % padded;
        biases[j] = key >= num_keys ? -INFINITY
                    : bias          ? bias[j / padded * num_keys + key] * kLog2e
                                    : 0.0f;
    }
#pragma omp parallel num_threads(threads) if (ready)
    for (int64_t start = 0; ready && start < all; start += group) {
        const typename T::Session session;
        const int64_t count = std::min(group, all - start);
#pragma omp for nowait
        for (int64_t i = 0; i < count * panels; i++) {
            const int64_t head = start + i / panels;
            pack_across<T>(k + head / heads * sk[0] + head % heads * sk[1], sk[2], num_keys, (int)d,
                         i % panels, keys + i / panels * words);
        }
#pragma omp for
        for (int64_t i = 0; i < count * tiles; i++) {
            const int64_t head = start + i / tiles;
            pack_along<T, kKeys>(v + head / heads * sv[0] + head % heads * sv[1], sv[2], num_keys, (int)d,
                           i % tiles, values + i / tiles * words);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count * blocks; i++) {
            const int64_t head = start + i / blocks, b = head / heads, h = head % heads;
            const int64_t first = i % blocks * kQueries;
            const int rows = (int)std::min<int64_t>(kQueries, num_queries - first);
            attend_block<T>(
                scratch[omp_get_thread_num()], q + b * sq[0] + h * sq[1] + first * sq[2], sq[2],
                keys + i / blocks * words, values + i / blocks * words, biases + b * padded,
                num_keys, rows, (int)d, scale, out + b * so[0] + h * so[1] + first * so[2], so[2],
                lse ? lse + head * num_queries + first : nullptr);
        }
    }
    free(keys), free(values), free(biases), free(scratch);
    return !ready;
}

}  // namespace

// Strides count elements: of batch, head and token, of q, k, v and out in this order; heads are
// dense along d. `bias` [B, Lk] is added to the scores, or null. `lse` [B, H, Lq] gets each row's
// log of the sum of exponentials, or null. d is a multiple of 64, at most 512. Gives 0, or 1 where
// memory is short.
#define VIDGEN_ATTENTION(name, Kind, choice)                                                     \
    extern "C" int name(                                                                         \
        const Kind::Value* q, const Kind::Value* k, const Kind::Value* v, const float* bias,     \
        Kind::Value* out, float* lse, int64_t batch, int64_t heads, int64_t num_queries,         \
        int64_t num_keys, int64_t d, const int64_t* strides, float scale, int64_t threads) {     \
        auto* run = choice;                                                                      \
        return run(q, k, v, bias, out, lse, batch, heads, num_queries, num_keys, d, strides,     \
                   scale, threads);                                                              \
    }

#if defined(__AMX_BF16__)
VIDGEN_ATTENTION(attention_bfloat16, BFloat16,
                 TileBFloat16::allowed() ? attend<TileBFloat16> : attend<BFloat16>)
#elif defined(__AVX512BF16__)
VIDGEN_ATTENTION(attention_bfloat16, BFloat16, attend<BFloat16>)
#endif
VIDGEN_ATTENTION(attention_float32, Float32, attend<Float32>)
