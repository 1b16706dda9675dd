// Products of float32 matrices on the matrix units (AMX) of a CPU, which multiply bfloat16 and add in float32.
//
// A float32 number of 24 bits is the exact sum of three bfloat16 numbers of 8 bits: high, middle and low. Of the nine
// products of two such sums the three smallest, 2^-24 of the whole and less, are below the last bit of float32. The six
// others take less time on the matrix units than float32 takes on the vector units, and the sums are as exact.
//
// The units work on tiles of 16 rows of 64 bytes. Both matrices are packed into the tiles of panels, of 32 rows of `a`
// and of 32 columns of `b`; four tiles of sums belong to a pair of panels.

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "arguments.h"
#include "parallel.h"
#include "workspace.h"

namespace videomamba {
namespace {

constexpr int kTile = 16;         // rows of a tile, and float32 numbers in one of them
constexpr int kPanel = 2 * kTile;  // rows or columns of a panel
constexpr int kStep = 32;         // numbers of the inner dimension in a row of a tile
constexpr int kPieces = 3;
constexpr int kAhead = 4;  // steps, of lines that are too far apart for the processor to guess what is wanted next
constexpr int64_t kTileSize = kTile * kStep, kStepSize = kPieces * 2 * kTileSize;  // of a panel
constexpr int64_t kMaxSteps = 18;           // of a panel, and
constexpr int64_t kChunkBytes = 768 << 10;  // of panels of `a`, that all of `b` passes by: they stay in the second cache
constexpr int64_t kLineSize = 64;           // bytes that the caches move together

int64_t panels(int64_t width) { return (width + kPanel - 1) / kPanel; }
int64_t steps(int64_t inner) { return (inner + kStep - 1) / kStep; }
int64_t panel_size(int64_t inner) { return steps(inner) * kStepSize; }

// 16 numbers of which the last ones may be missing.
__m512 read(const float* source, int64_t count) {
    if (count >= kTile) return _mm512_loadu_ps(source);
    return count > 0 ? _mm512_maskz_loadu_ps((1u << count) - 1, source) : _mm512_setzero_ps();
}

// Cuts the leading 8 bits off each number, which are left in the upper half of its place.
__m512i cut(__m512& values) {
    const __m512i upper = _mm512_and_si512(_mm512_castps_si512(values), _mm512_set1_epi32(~0xffff));
    values = _mm512_sub_ps(values, _mm512_castsi512_ps(upper));
    return upper;
}

void transpose(__m512i* rows) {
    __m512i t[kTile];
    for (int i = 0; i < kTile; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < kTile; i += 4)
        for (int j = 0; j < 2; ++j) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < kTile; i += 8)
        for (int j = 0; j < 4; ++j) {
            t[i + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; ++j) {
        rows[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        rows[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    }
}

// One tile of each piece from 16 lines (rows of `a` or columns of `b`), of which there may be fewer, and 32 numbers of
// the inner dimension. A row of a tile holds pairs of neighbours in the inner dimension: of one row of `a`, or of all 16
// columns of `b`.
void pack_tile(const float* source, int64_t line_stride, int64_t inner_stride, int64_t lines, int64_t inner,
               bool is_b, uint16_t* target) {
    // of two vectors of float32, the upper half of each number: in turn, or those of the first vector before the others
    const __m512i in_turn = _mm512_set_epi16(63, 31, 61, 29, 59, 27, 57, 25, 55, 23, 53, 21, 51, 19, 49, 17, 47, 15, 45,
                                             13, 43, 11, 41, 9, 39, 7, 37, 5, 35, 3, 33, 1);
    const __m512i one_after_other = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31,
                                                     29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    const bool by_line = inner_stride == 1;  // a vector runs along the inner dimension, else across the lines
    const __m512i order = by_line ? one_after_other : in_turn;
    __m512i tiles[kPieces][kTile];
    for (int row = 0; row < kTile; ++row) {
        __m512 first = _mm512_setzero_ps(), second = first;
        if (by_line && row < lines) {
            const float* line = source + row * line_stride;
            __builtin_prefetch(line + kAhead * kStep), __builtin_prefetch(line + kAhead * kStep + kTile);
            first = read(line, inner);
            second = read(line + kTile, inner - kTile);
        } else if (!by_line) {
            const float* pair = source + 2 * row * inner_stride;
            __builtin_prefetch(pair + kAhead * kStep * inner_stride);
            __builtin_prefetch(pair + (kAhead * kStep + 1) * inner_stride);
            if (2 * row < inner) first = read(pair, lines);
            if (2 * row + 1 < inner) second = read(pair + inner_stride, lines);
        }
        for (auto& tile : tiles) {
            const __m512i upper = cut(first);
            tile[row] = _mm512_permutex2var_epi16(upper, order, cut(second));
        }
    }
    for (int piece = 0; piece < kPieces; ++piece) {
        if (by_line == is_b) transpose(tiles[piece]);
        uint16_t* tile = target + piece * 2 * kTileSize;
        for (int row = 0; row < kTile; ++row) _mm512_store_si512(tile + row * kStep, tiles[piece][row]);
    }
}

// Some steps of panel `index` of `a` or `b`: [step][piece][tile].
void pack_panel(const VideoMambaMatrixProduct& product, bool is_b, int64_t index, int64_t first_step, int64_t last_step,
                uint16_t* target) {
    const VideoMambaMatrix& matrix = is_b ? product.b : product.a;
    const int64_t line_stride = is_b ? matrix.column_stride : matrix.row_stride;
    const int64_t inner_stride = is_b ? matrix.row_stride : matrix.column_stride;
    const int64_t lines = is_b ? product.columns : product.rows;
    for (int64_t step = first_step; step < last_step; ++step, target += kStepSize)
        for (int tile = 0; tile < 2; ++tile) {
            const int64_t line = index * kPanel + tile * kTile, inner = step * kStep;
            pack_tile(matrix.data + line * line_stride + inner * inner_stride, line_stride, inner_stride, lines - line,
                      product.inner - inner, is_b, target + tile * kTileSize);
        }
}

// The settings of the tiles are those of a thread. PyTorch's own library may rely on finding its settings again.
class Tiles {
  public:
    Tiles() {
        _tile_storeconfig(&before_);
        Settings settings{1, 0, {}, {}, {}};
        for (int tile = 0; tile < 8; ++tile) settings.row_bytes[tile] = 64, settings.rows[tile] = kTile;
        _tile_loadconfig(&settings);
    }
    ~Tiles() { _tile_loadconfig(&before_); }
    Tiles(const Tiles&) = delete;

  private:
    struct alignas(64) Settings {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } before_;
};

// Tiles 0 to 3 are sums, 4 and 5 are of `a`, 6 and 7 of `b`. The last panel of `b` may be half empty.
inline void load_a(const uint16_t* step, int piece) {
    _tile_loadd(4, step + piece * 2 * kTileSize, 64);
    _tile_loadd(5, step + piece * 2 * kTileSize + kTileSize, 64);
}
template <bool kIsHalf>
inline void load_b(const uint16_t* step, int piece) {
    _tile_loadd(6, step + piece * 2 * kTileSize, 64);
    if constexpr (!kIsHalf) _tile_loadd(7, step + piece * 2 * kTileSize + kTileSize, 64);
}
template <bool kIsHalf>
inline void multiply() {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (!kIsHalf) _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (!kIsHalf) _tile_dpbf16ps(3, 5, 7);
}

// What will be wanted next, to be fetched while there is something else to do: `lines` at each step.
struct Ahead {
    const uint16_t* next;
    int64_t lines;

    void fetch() {
        for (int64_t line = 0; line < lines; ++line, next += kLineSize / sizeof *next) __builtin_prefetch(next, 0, 2);
    }
};

// Adds the product of some steps of two panels to 32 rows and columns of `c`, or writes it there if it `is_first`: of the
// pieces whose product matters, in an order that loads few tiles.
template <bool kIsHalf>
void multiply_panels(const uint16_t* a, const uint16_t* b, int64_t steps, Ahead ahead, float* c, int64_t c_stride,
                     bool is_first) {
    constexpr int kHigh = 0, kMiddle = 1, kLow = 2;
    const int64_t row_bytes = c_stride * sizeof(float);
    float* const lower = c + kTile * c_stride;
    if (is_first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, c, row_bytes);
        _tile_loadd(1, c + kTile, row_bytes);
        _tile_loadd(2, lower, row_bytes);
        _tile_loadd(3, lower + kTile, row_bytes);
    }
    for (int64_t step = 0; step < steps; ++step, a += kStepSize, b += kStepSize) {
        ahead.fetch();
        load_a(a, kLow), load_b<kIsHalf>(b, kHigh), multiply<kIsHalf>();
        load_a(a, kMiddle), multiply<kIsHalf>();
        load_b<kIsHalf>(b, kMiddle), multiply<kIsHalf>();
        load_a(a, kHigh), multiply<kIsHalf>();
        load_b<kIsHalf>(b, kLow), multiply<kIsHalf>();
        load_b<kIsHalf>(b, kHigh), multiply<kIsHalf>();
    }
    _tile_stored(0, c, row_bytes);
    _tile_stored(1, c + kTile, row_bytes);
    _tile_stored(2, lower, row_bytes);
    _tile_stored(3, lower + kTile, row_bytes);
}

// The share of one thread: some panels of `a` by some of `b`.
class Multiplication {
  public:
    Multiplication(const VideoMambaMatrixProduct& product, int64_t first_a, int64_t last_a, int64_t first_b,
                   int64_t last_b)
        : product_(product), first_a_(first_a), last_a_(last_a), first_b_(first_b), last_b_(last_b) {}

    void run() {
        const Tiles tiles;
        const int64_t all = steps(product_.inner);
        for (first_step_ = 0; first_step_ < all; first_step_ += kMaxSteps) {
            steps_ = std::min(kMaxSteps, all - first_step_);
            const int64_t most = std::max<int64_t>(1, kChunkBytes / (2 * steps_ * kStepSize));
            for (int64_t first = first_a_; first < last_a_; first += most)
                multiply_chunk(first, std::min(first + most, last_a_));
        }
    }

  private:
    // Panels of `a` are packed and stay in the cache while those of `b` pass by.
    void multiply_chunk(int64_t first, int64_t last) {
        const int64_t size = steps_ * kStepSize, count = last - first;
        uint16_t* packed = workspace(count * size);
        for (int64_t i = 0; i < count; ++i)
            pack_panel(product_, false, first + i, first_step_, first_step_ + steps_, packed + i * size);
        const int64_t lines = size * sizeof *packed / kLineSize / steps_, share = (lines + count - 1) / count;
        for (int64_t b = first_b_; b < last_b_; ++b)
            for (int64_t i = 0; i < count; ++i) {
                const int64_t offset = i * steps_ * share * kLineSize / sizeof *packed;
                const Ahead ahead{panel_of_b(std::min(b + 1, last_b_ - 1)) + offset, share};
                multiply_one(packed + i * size, first + i, b, ahead);
            }
    }

    void multiply_one(const uint16_t* a, int64_t a_panel, int64_t b_panel, Ahead ahead) const {
        const uint16_t* b = panel_of_b(b_panel);
        float* c = product_.c + a_panel * kPanel * product_.c_stride + b_panel * kPanel;
        const int64_t rows = std::min<int64_t>(kPanel, product_.rows - a_panel * kPanel);
        const int64_t columns = std::min<int64_t>(kPanel, product_.columns - b_panel * kPanel);
        const bool is_first = first_step_ == 0;
        if (rows == kPanel && columns == kPanel)
            return multiply_panels<false>(a, b, steps_, ahead, c, product_.c_stride, is_first);
        alignas(kLineSize) float sums[kPanel * kPanel];
        for (int64_t row = 0; row < rows && !is_first; ++row)
            std::copy_n(c + row * product_.c_stride, columns, sums + row * kPanel);
        const auto multiply = columns <= kTile ? multiply_panels<true> : multiply_panels<false>;
        multiply(a, b, steps_, ahead, sums, kPanel, is_first);
        for (int64_t row = 0; row < rows; ++row) std::copy_n(sums + row * kPanel, columns, c + row * product_.c_stride);
    }

    const uint16_t* panel_of_b(int64_t index) const {
        return product_.packed + index * panel_size(product_.inner) + first_step_ * kStepSize;
    }

    // Of a thread, for all its products: to fill new memory would take as long as some of them.
    static uint16_t* workspace(int64_t size) {
        thread_local std::vector<Line> lines;
        const size_t needed = size * sizeof(uint16_t) / kLineSize;
        if (lines.size() < needed) lines.resize(needed);
        return reinterpret_cast<uint16_t*>(lines.data());
    }
    struct alignas(kLineSize) Line {
        char bytes[kLineSize];
    };

    const VideoMambaMatrixProduct& product_;
    const int64_t first_a_, last_a_, first_b_, last_b_;
    int64_t first_step_ = 0, steps_ = 0;
};

}  // namespace
}  // namespace videomamba

using namespace videomamba;

extern "C" __attribute__((visibility("default"))) int64_t videomamba_version() { return kVersion; }

// Whether the processor has matrix units for bfloat16 and the system lets this process use them.
extern "C" __attribute__((visibility("default"))) int64_t videomamba_has_matrix_units() {
    constexpr unsigned kBFloat16Bit = 1u << 22, kTileBit = 1u << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl, in the kernel's asm/prctl.h
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & kBFloat16Bit) || !(edx & kTileBit)) return 0;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Numbers that `packed` must have room for, of 2 bytes each.
extern "C" __attribute__((visibility("default"))) int64_t videomamba_packed_size(int64_t inner, int64_t columns) {
    return panels(columns) * panel_size(inner);
}

// Fills `packed` with `b`.
extern "C" __attribute__((visibility("default"))) void videomamba_pack(const VideoMambaMatrixProduct* product) {
    const int64_t count = panels(product->columns), parts = std::min(product->threads, count);
    parallel(parts, [&](int64_t part) {
        for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i)
            pack_panel(*product, true, i, 0, steps(product->inner), product->packed + i * panel_size(product->inner));
    });
}

// c = a b, of which b is packed.
extern "C" __attribute__((visibility("default"))) void videomamba_matrix_product(const VideoMambaMatrixProduct* product) {
    const int64_t rows = panels(product->rows), columns = panels(product->columns);
    const int64_t row_parts = std::min(product->threads, rows);
    const int64_t column_parts = std::min(product->threads / row_parts, columns), parts = row_parts * column_parts;
    parallel(parts, [&](int64_t part) {
        const int64_t i = part / column_parts, j = part % column_parts;
        Multiplication(*product, rows * i / row_parts, rows * (i + 1) / row_parts, columns * j / column_parts,
                       columns * (j + 1) / column_parts)
            .run();
    });
}
