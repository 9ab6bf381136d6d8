// Convolution in float32, channels last: an indirect matrix product (Dukhan 2019, 1907.02129).
//
// Each tap of an output pixel is a row of input channels, found through a pointer, so nothing is
// padded or copied: taps beyond the edge point to zeros. A tile of pixels and output channels stays
// in registers for some hundred products and is then added to memory; such sums of short chains
// err less than half as much as one chain through all taps.

#include "vectors.h"

#include <vector>

namespace {

constexpr int64_t kChain = 384;      // products that add up in a register
constexpr int64_t kChunk = 3 << 18;  // bytes of weights that the second-level cache holds
constexpr int64_t kBlock = 2048;     // pixels that meet them there
constexpr int64_t kSkew = kLanes;    // floats after each tap, lest all share a few cache lines
constexpr int kMaxTaps = 27;

// As Python passes it. Clips are [batch, frames, rows, columns, channels].
struct Shape {
    int64_t batch, frames, rows, columns, channels;
    int64_t out_frames, out_rows, out_columns, out_channels;
    int64_t taps_t, taps_y, taps_x, stride_t, stride_y, stride_x, pad_y, pad_x;

    int64_t taps() const { return taps_t * taps_y * taps_x; }
    int64_t pixels() const { return batch * out_frames * out_rows * out_columns; }
    int64_t tap_size(int lanes) const { return channels * lanes + kSkew; }
};

// Weights [out, in, taps] as [tiles of out, taps, in, lanes], zeros beyond the last of `out`.
void pack(const float* weight, float* packed, const Shape& s, int lanes, int threads) {
    const int64_t tiles = (s.out_channels + lanes - 1) / lanes, taps = s.taps();
#pragma omp parallel for num_threads(threads) collapse(2)
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t c = 0; c < s.channels; c++)
            for (int lane = 0; lane < lanes; lane++) {
                const int64_t out = tile * lanes + lane;
                const float* from = weight + (out * s.channels + c) * taps;
                float* to = packed + tile * taps * s.tap_size(lanes) + c * lanes + lane;
                for (int64_t tap = 0; tap < taps; tap++)
                    to[tap * s.tap_size(lanes)] = out < s.out_channels ? from[tap] : 0.0f;
            }
}

// Where a tap reads, from where the first one does.
struct Tap {
    int64_t row, column, offset;
};

std::vector<Tap> taps_of(const Shape& s) {
    std::vector<Tap> taps;
    for (int64_t t = 0; t < s.taps_t; t++)
        for (int64_t y = 0; y < s.taps_y; y++)
            for (int64_t x = 0; x < s.taps_x; x++)
                taps.push_back({y, x, ((t * s.rows + y) * s.columns + x) * s.channels});
    return taps;
}

// What each tap of an output pixel reads; `from` goes by `step` from tap to tap.
void find_taps(const float* x, const float* zeros, const Shape& s, int64_t pixel, const Tap* tap,
               int64_t count, const float** from, int step) {
    const int64_t column = pixel % s.out_columns * s.stride_x - s.pad_x;
    pixel /= s.out_columns;
    const int64_t row = pixel % s.out_rows * s.stride_y - s.pad_y;
    pixel /= s.out_rows;
    const int64_t frame = pixel / s.out_frames * s.frames + pixel % s.out_frames * s.stride_t;
    const int64_t start = ((frame * s.rows + row) * s.columns + column) * s.channels;
    for (int64_t i = 0; i < count; i++, tap++, from += step) {
        const uint64_t y = row + tap->row, at = column + tap->column;  // below 0 is beyond the end
        *from = y < (uint64_t)s.rows && at < (uint64_t)s.columns ? x + start + tap->offset : zeros;
    }
}

// sums += what `taps` taps of the pixels read, times their weights.
template <int kPixels, int kVectors>
void multiply(const float* const (*from)[kPixels], const float* weights, int64_t taps,
              const Shape& s, Floats (&sums)[kPixels][kVectors]) {
    for (int64_t tap = 0; tap < taps; tap++, weights += s.tap_size(kVectors * kLanes)) {
        const float* weight = weights;
        const float* pixel[kPixels];
        for (int p = 0; p < kPixels; p++) pixel[p] = from[tap][p];
        for (int64_t c = 0; c < s.channels; c++, weight += kVectors * kLanes) {
            Floats row[kVectors];
            for (int v = 0; v < kVectors; v++) row[v] = load_unaligned(weight + v * kLanes);
#pragma GCC unroll 16
            for (int p = 0; p < kPixels; p++) {
                const Floats value = all(pixel[p][c]);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; v++) sums[p][v] = fmadd(value, row[v], sums[p][v]);
            }
        }
    }
}

// One block of pixels and one tile of output channels.
template <int kPixels, int kVectors>
void convolve_tile(const float* x, const float* zeros, const std::vector<Tap>& where,
                   const float* weights, const float* bias, float* out, const Shape& s,
                   int64_t first, int64_t last, int64_t channel) {
    const int64_t size = s.tap_size(kVectors * kLanes), taps = s.taps();
    const int64_t chunk = std::clamp<int64_t>(kChunk / (size * 4), 1, taps);
    const int64_t chain = std::clamp<int64_t>(kChain / s.channels, 1, chunk);
    for (int64_t begin = 0; begin < taps; begin += chunk) {
        const int64_t end = std::min(begin + chunk, taps);
        for (int64_t pixel = first; pixel < last; pixel += kPixels) {
            const float* from[kMaxTaps][kPixels];
            for (int p = 0; p < kPixels; p++)
                find_taps(x, zeros, s, std::min(pixel + p, last - 1), &where[begin], end - begin,
                          &from[0][p], kPixels);
            for (int64_t tap = begin; tap < end; tap += chain) {
                Floats sums[kPixels][kVectors];
                for (auto& row : sums)
                    for (Floats& sum : row) sum = all(0.0f);
                multiply<kPixels, kVectors>(from + (tap - begin), weights + tap * size,
                                            std::min(chain, end - tap), s, sums);
                for (int64_t p = 0; p < std::min<int64_t>(kPixels, last - pixel); p++)
                    for (int v = 0; v < kVectors; v++) {
                        const int64_t c = channel + v * kLanes;
                        if (c >= s.out_channels) break;
                        const Mask live = live_from((int)c, (int)s.out_channels);
                        float* to = out + (pixel + p) * s.out_channels + c;
                        const float* before = tap ? to : bias ? bias + c : zeros;
                        store_live(to, load_live(before, live) + sums[p][v], live);
                    }
            }
        }
    }
}

template <int kPixels, int kVectors>
void convolve(const float* x, const float* weight, const float* bias, float* out, float* packed,
              const Shape& s, int threads) {
    constexpr int kTile = kVectors * kLanes;
    pack(weight, packed, s, kTile, threads);
    const std::vector<Tap> where = taps_of(s);
    const std::vector<float> zeros(std::max<int64_t>(s.channels, kLanes));
#pragma omp parallel for num_threads(threads) schedule(dynamic) collapse(2)
    for (int64_t first = 0; first < s.pixels(); first += kBlock)
        for (int64_t channel = 0; channel < s.out_channels; channel += kTile)
            convolve_tile<kPixels, kVectors>(
                x, zeros.data(), where, packed + channel / kTile * s.taps() * s.tap_size(kTile),
                bias, out, s, first, std::min(first + kBlock, s.pixels()), channel);
}

}  // namespace

// All is dense; weight is [out channels, channels, taps], at most 27. `packed` is scratch of
// taps * (channels + 1) floats for each out channel, these rounded up to 64. `bias` may be null.
extern "C" void convolve_float32(
    const float* x, const float* weight, const float* bias, float* out, float* packed,
    const int64_t* shape, int64_t threads) {
    const Shape& s = *(const Shape*)shape;
    const int64_t vectors = (s.out_channels + kLanes - 1) / kLanes;
    const int n = (int)threads;
#ifdef __AVX512F__
    if (vectors % 3 == 0) return convolve<8, 3>(x, weight, bias, out, packed, s, n);
    if (vectors % 4 == 0) return convolve<6, 4>(x, weight, bias, out, packed, s, n);
#else
    if (vectors % 2 == 0) return convolve<6, 2>(x, weight, bias, out, packed, s, n);
#endif
    convolve<12, 1>(x, weight, bias, out, packed, s, n);
}
