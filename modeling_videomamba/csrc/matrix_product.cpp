// Products of float32 matrices on the matrix units (AMX) of a CPU, which multiply bfloat16 and add in float32.
//
// A float32 number of 24 bits is the exact sum of three bfloat16 numbers of 8 bits: high, middle and low. Of the nine
// products of two such sums the three smallest, 2^-24 of the whole and less, are below the last bit of float32. The six
// others take less time on the matrix units than float32 takes on the vector units, and the sums are as exact.
//
// The units work on tiles of 16 rows of 64 bytes. Both matrices are packed into the tiles of panels, of 32 rows of `a`
// and of 32 columns of `b`; four tiles of sums belong to a pair of panels. The units take little of what else a core can
// do at the same time, so that the panels of `a` are packed, and memory is fetched, between the products of those before.
// All of `b` is packed first, as is best for the weight of a linear layer; or, as is best for a long inner dimension, like
// that of the gradient of a weight, a few rows of `b` at a time.

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <memory>

#include "arguments.h"
#include "parallel.h"
#include "workspace.h"

namespace videomamba {
namespace {

constexpr int kTile = 16;           // rows of a tile, and float32 numbers in one of them
constexpr int kPanel = 2 * kTile;   // rows or columns of a panel
constexpr int kStep = 32;           // numbers of the inner dimension in a row of a tile
constexpr int kPieces = 3;
constexpr int64_t kTileSize = kTile * kStep, kStepSize = kPieces * 2 * kTileSize;  // of a panel
constexpr int64_t kMaxSteps = 12;   // of a panel of `a`, of which this one and the next stay in the second cache, and
constexpr int64_t kStepsOfB = 172;  // of panels of `b`
constexpr int64_t kStepParts = 8;   // at most, each with a matrix of sums
constexpr int64_t kLineSize = 64;   // bytes that the caches move together

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

// Packs a tile of each piece from 16 lines (rows of `a` or columns of `b`) and 32 numbers of the inner dimension, of which
// there may be fewer, row by row. A row of a tile holds pairs of neighbours in the inner dimension: of one row of `a`, or
// of all 16 columns of `b`. Where a vector can't be read that way, it is a tile of pairs to be transposed.
class TilePacking {
  public:
    TilePacking(const VideoMambaMatrix& matrix, int64_t lines, int64_t inner, bool is_b)
        : line_stride_(is_b ? matrix.column_stride : matrix.row_stride),
          inner_stride_(is_b ? matrix.row_stride : matrix.column_stride),
          all_lines_(lines),
          all_inner_(inner),
          data_(matrix.data),
          by_line_(inner_stride_ == 1),
          is_transposed_(by_line_ == is_b) {}

    // What a tile takes.
    int64_t parts() const { return is_transposed_ ? kTile + kPieces : kTile; }

    void start(int64_t line, int64_t step, uint16_t* target) {
        source_ = data_ + line * line_stride_ + step * kStep * inner_stride_;
        lines_ = all_lines_ - line, inner_ = all_inner_ - step * kStep;
        target_ = target;
    }
    void run(int64_t part) {
        if (part >= kTile)
            transpose_piece(part - kTile);
        else if (by_line_)
            pack_row<true>(part);
        else
            pack_row<false>(part);
    }

  private:
    // A vector runs along the inner dimension if kByLine, else across the lines.
    template <bool kByLine>
    void pack_row(int64_t row) {
        // of two vectors of float32, the upper half of each number: those of the first vector before the others, or in turn
        const __m512i one_after_other = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33,
                                                         31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
        const __m512i in_turn = _mm512_set_epi16(63, 31, 61, 29, 59, 27, 57, 25, 55, 23, 53, 21, 51, 19, 49, 17, 47, 15,
                                                 45, 13, 43, 11, 41, 9, 39, 7, 37, 5, 35, 3, 33, 1);
        const __m512i order = kByLine ? one_after_other : in_turn;
        const float* source = source_ + (kByLine ? row * line_stride_ : 2 * row * inner_stride_);
        const int64_t step = kByLine ? kTile : inner_stride_;
        const int64_t count = kByLine ? (row < lines_ ? inner_ : 0) : (2 * row < inner_ ? lines_ : 0);
        const int64_t second_count = kByLine ? count - kTile : (2 * row + 1 < inner_ ? lines_ : 0);
        const float* next_panel = source + kPanel * line_stride_;
        __builtin_prefetch(next_panel, 0, 2), __builtin_prefetch(next_panel + step, 0, 2);
        __m512 first = read(source, count), second = read(source + step, second_count);
        uint16_t* target = is_transposed_ ? pairs_ + row * kStep : target_ + row * kStep;
        const int64_t piece_stride = is_transposed_ ? kTileSize : 2 * kTileSize;
        for (int piece = 0; piece < kPieces; ++piece, target += piece_stride) {
            const __m512i upper = cut(first);
            _mm512_store_si512(target, _mm512_permutex2var_epi16(upper, order, cut(second)));
        }
    }

    void transpose_piece(int64_t piece) {
        __m512i rows[kTile];
        for (int row = 0; row < kTile; ++row) rows[row] = _mm512_load_si512(pairs_ + piece * kTileSize + row * kStep);
        transpose(rows);
        for (int row = 0; row < kTile; ++row) _mm512_store_si512(target_ + piece * 2 * kTileSize + row * kStep, rows[row]);
    }

    const int64_t line_stride_, inner_stride_, all_lines_, all_inner_;
    const float* const data_;
    const bool by_line_, is_transposed_;
    const float* source_ = nullptr;
    int64_t lines_ = 0, inner_ = 0;
    uint16_t* target_ = nullptr;
    alignas(kLineSize) uint16_t pairs_[kPieces * kTileSize];
};

// A panel of `a` or `b` at some steps of the inner dimension; none without steps.
struct Panel {
    int64_t index, first_step, last_step;

    int64_t steps() const { return last_step - first_step; }
};

// Packs a panel, [step][piece][tile], part by part.
class Packing {
  public:
    Packing(const VideoMambaMatrixProduct& product, bool is_b, const Panel& panel, uint16_t* packed)
        : tile_(is_b ? product.b : product.a, is_b ? product.columns : product.rows, product.inner, is_b),
          panel_(panel),
          packed_(packed),
          parts_(2 * panel.steps() * tile_.parts()) {}

    int64_t parts() const { return parts_; }
    void run_next() {
        if (part_ == 0) {
            const int64_t step = next_tile_ / 2, tile = next_tile_ % 2;
            tile_.start(panel_.index * kPanel + tile * kTile, panel_.first_step + step,
                        packed_ + step * kStepSize + tile * kTileSize);
        }
        tile_.run(part_);
        if (++part_ == tile_.parts()) part_ = 0, ++next_tile_;
    }
    void run_all() {
        while (next_tile_ < 2 * panel_.steps()) run_next();
    }

  private:
    TilePacking tile_;
    const Panel panel_;
    uint16_t* const packed_;
    const int64_t parts_;
    int64_t next_tile_ = 0, part_ = 0;
};

// What is done between the products of tiles, a little each time: while a core goes through more than it can look ahead of,
// the matrix units wait. The next panel of `a` is packed, and what will be written next is fetched.
class Meanwhile {
  public:
    // The panel will be packed after so many calls of `advance`.
    Meanwhile(const VideoMambaMatrixProduct& product, const Panel& panel, uint16_t* packed, int64_t calls)
        : packing_(product, false, panel, packed), calls_(calls), c_stride_(product.c_stride) {}

    // 32 rows and columns of `c`, during so many calls.
    void fetch(const float* c, int64_t calls) { c_ = c, rows_ = (kPanel + calls - 1) / calls; }

    void advance() {
        for (int64_t i = 0; i < rows_; ++i, c_ += c_stride_) __builtin_prefetch(c_, 1), __builtin_prefetch(c_ + kTile, 1);
        for (due_ += packing_.parts(); due_ >= calls_; due_ -= calls_) packing_.run_next();
    }

  private:
    Packing packing_;
    const int64_t calls_, c_stride_;
    int64_t due_ = 0, rows_ = 0;
    const float* c_ = nullptr;
};

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
constexpr int kProducts = 6;  // of tiles of the pieces of two numbers
template <bool kIsHalf>
inline void multiply(Meanwhile& meanwhile) {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (!kIsHalf) _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (!kIsHalf) _tile_dpbf16ps(3, 5, 7);
    meanwhile.advance();
}

// Adds the product of some steps of two panels to 32 rows and columns of `c`, or writes it there if it `is_first`: of the
// pieces whose product matters, in an order that loads few tiles.
template <bool kIsHalf>
void multiply_panels(const uint16_t* a, const uint16_t* b, int64_t steps, float* c, int64_t c_stride, bool is_first,
                     Meanwhile& meanwhile) {
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
        load_a(a, kLow), load_b<kIsHalf>(b, kHigh), multiply<kIsHalf>(meanwhile);
        load_a(a, kMiddle), multiply<kIsHalf>(meanwhile);
        load_b<kIsHalf>(b, kMiddle), multiply<kIsHalf>(meanwhile);
        load_a(a, kHigh), multiply<kIsHalf>(meanwhile);
        load_b<kIsHalf>(b, kLow), multiply<kIsHalf>(meanwhile);
        load_b<kIsHalf>(b, kHigh), multiply<kIsHalf>(meanwhile);
    }
    _tile_stored(0, c, row_bytes);
    _tile_stored(1, c + kTile, row_bytes);
    _tile_stored(2, lower, row_bytes);
    _tile_stored(3, lower + kTile, row_bytes);
}

// Lines of a cache for the work of one thread.
class Lines {
  public:
    uint16_t* take(int64_t size) {
        const size_t needed = size * sizeof(uint16_t) / kLineSize;
        if (lines_.size() < needed) lines_.resize(needed);
        return reinterpret_cast<uint16_t*>(lines_.data());
    }

  private:
    struct alignas(kLineSize) Line {
        char bytes[kLineSize];
    };
    std::vector<Line> lines_;
};

// From one number to another, without the last.
struct Range {
    int64_t first, last;

    int64_t size() const { return last - first; }
    Range part(int64_t index, int64_t parts) const {
        return {first + size() * index / parts, first + size() * (index + 1) / parts};
    }
};

// All panels of `b` at some steps.
struct PackedB {
    uint16_t* data;
    Range steps;

    uint16_t* at(int64_t panel, int64_t step) const {
        return data + (panel * steps.size() + step - steps.first) * kStepSize;
    }
};

// Some panels of `a` by some of `b`, at those steps at which `b` is packed.
class Multiplication {
  public:
    Multiplication(const VideoMambaMatrixProduct& product, const PackedB& b, Range panels_of_a, Range panels_of_b,
                   bool is_first)
        : product_(product), b_(b), panels_of_a_(panels_of_a), panels_of_b_(panels_of_b), is_first_(is_first) {}

    void run() {
        const Tiles tiles;
        Block block = block_at(b_.steps.first, panels_of_b_.first, panels_of_a_.first);
        thread_local Lines lines;  // for all products: to fill new memory would take as long as some of them
        uint16_t *packed = lines.take(2 * kMaxSteps * kStepSize), *other = packed + kMaxSteps * kStepSize;
        Packing(product_, false, block.a, packed).run_all();
        while (block.a.steps()) {
            const Block next = after(block);
            multiply_block(block, packed, next.a, other);
            block = next;
            std::swap(packed, other);
        }
    }

  private:
    // A panel of `a`, and those of `b` that stay in the cache while the panels of `a` pass by.
    struct Block {
        Panel a;
        int64_t first_b, last_b;
    };
    Block block_at(int64_t first_step, int64_t first_b, int64_t index) const {
        const Panel a{index, first_step, std::min(first_step + kMaxSteps, b_.steps.last)};
        return {a, first_b, std::min(first_b + kStepsOfB / a.steps(), panels_of_b_.last)};
    }
    Block after(const Block& block) const {
        const Panel& a = block.a;
        if (a.index + 1 < panels_of_a_.last) return block_at(a.first_step, block.first_b, a.index + 1);
        if (block.last_b < panels_of_b_.last) return block_at(a.first_step, block.last_b, panels_of_a_.first);
        if (a.last_step < b_.steps.last) return block_at(a.last_step, panels_of_b_.first, panels_of_a_.first);
        return {};
    }

    void multiply_block(const Block& block, const uint16_t* packed, const Panel& next, uint16_t* packed_next) const {
        const int64_t calls = block.a.steps() * kProducts;
        Meanwhile meanwhile(product_, next, packed_next, (block.last_b - block.first_b) * calls);
        for (int64_t b = block.first_b; b < block.last_b; ++b) {
            const bool is_last = b + 1 == block.last_b;
            meanwhile.fetch(is_last ? part_of_c(block.a.index + 1, block.first_b) : part_of_c(block.a.index, b + 1), calls);
            multiply_one(packed, block.a, b, meanwhile);
        }
    }

    void multiply_one(const uint16_t* packed_a, const Panel& a, int64_t b, Meanwhile& meanwhile) const {
        const uint16_t* packed_b = b_.at(b, a.first_step);
        float* c = part_of_c(a.index, b);
        const int64_t rows = std::min<int64_t>(kPanel, product_.rows - a.index * kPanel);
        const int64_t columns = std::min<int64_t>(kPanel, product_.columns - b * kPanel);
        const bool is_first = is_first_ && a.first_step == b_.steps.first;
        if (rows == kPanel && columns == kPanel)
            return multiply_panels<false>(packed_a, packed_b, a.steps(), c, product_.c_stride, is_first, meanwhile);
        alignas(kLineSize) float sums[kPanel * kPanel];
        for (int64_t row = 0; row < rows && !is_first; ++row)
            std::copy_n(c + row * product_.c_stride, columns, sums + row * kPanel);
        const auto multiply = columns <= kTile ? multiply_panels<true> : multiply_panels<false>;
        multiply(packed_a, packed_b, a.steps(), sums, kPanel, is_first, meanwhile);
        for (int64_t row = 0; row < rows; ++row) std::copy_n(sums + row * kPanel, columns, c + row * product_.c_stride);
    }

    float* part_of_c(int64_t a, int64_t b) const { return product_.c + a * kPanel * product_.c_stride + b * kPanel; }

    const VideoMambaMatrixProduct& product_;
    const PackedB b_;
    const Range panels_of_a_, panels_of_b_;
    const bool is_first_;
};

void pack_step(const VideoMambaMatrixProduct& product, const PackedB& b, int64_t panel, int64_t step) {
    Packing(product, true, {panel, step, step + 1}, b.at(panel, step)).run_all();
}

// The product of some panels of `a` at some steps. `b` is packed a few steps at a time, which stay in the second cache.
void multiply_steps(const VideoMambaMatrixProduct& product, Range panels_of_a, Range all_steps) {
    const Range panels_of_b{0, panels(product.columns)};
    const int64_t block = std::clamp<int64_t>(kStepsOfB / panels_of_b.size(), 1, kMaxSteps);
    thread_local Lines lines;
    uint16_t* packed = lines.take(panels_of_b.size() * block * kStepSize);
    for (int64_t first = all_steps.first; first < all_steps.last; first += block) {
        const PackedB b{packed, {first, std::min(first + block, all_steps.last)}};
        for (int64_t step = b.steps.first; step < b.steps.last; ++step)
            for (int64_t panel = 0; panel < panels_of_b.last; ++panel) pack_step(product, b, panel, step);
        Multiplication(product, b, panels_of_a, panels_of_b, first == all_steps.first).run();
    }
}

// Each thread has some steps and, where there are many threads, rows; what those of the same rows make is added up.
void multiply_in_steps(const VideoMambaMatrixProduct& product) {
    const Range all_steps{0, steps(product.inner)}, all_panels{0, panels(product.rows)};
    const int64_t step_parts = std::min({product.threads, all_steps.size(), kStepParts});
    const int64_t row_parts = std::min(product.threads / step_parts, all_panels.size());
    const int64_t parts = step_parts * row_parts, size = product.rows * product.columns;
    const std::unique_ptr<float[]> others(new float[(step_parts - 1) * size]);
    parallel(parts, [&](int64_t part) {
        const int64_t step_part = part / row_parts;
        VideoMambaMatrixProduct share = product;
        if (step_part > 0) share.c = &others[(step_part - 1) * size], share.c_stride = product.columns;
        multiply_steps(share, all_panels.part(part % row_parts, row_parts), all_steps.part(step_part, step_parts));
    });
    if (step_parts == 1) return;
    parallel(parts, [&](int64_t part) {
        const Range rows = Range{0, product.rows}.part(part, parts);
        for (int64_t row = rows.first; row < rows.last; ++row)
            for (int64_t other = 0; other < step_parts - 1; ++other) {
                const float* source = &others[other * size + row * product.columns];
                float* c = product.c + row * product.c_stride;
                for (int64_t column = 0; column < product.columns; ++column) c[column] += source[column];
            }
    });
}

// Each thread has some rows and columns.
void multiply_packed(const VideoMambaMatrixProduct& product) {
    const Range rows{0, panels(product.rows)}, columns{0, panels(product.columns)};
    const int64_t row_parts = std::min(product.threads, rows.size());
    const int64_t column_parts = std::min(product.threads / row_parts, columns.size());
    const PackedB b{product.packed, {0, steps(product.inner)}};
    parallel(row_parts * column_parts, [&](int64_t part) {
        const Range its_rows = rows.part(part / column_parts, row_parts);
        Multiplication(product, b, its_rows, columns.part(part % column_parts, column_parts), true).run();
    });
}

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
    const PackedB b{product->packed, {0, steps(product->inner)}};
    const int64_t all_steps = b.steps.size(), all_panels = panels(product->columns);
    // as the matrix lies in memory: all steps of a panel, or all panels of a step
    const bool by_panel = product->b.row_stride == 1;
    const Range outer{0, by_panel ? all_panels : all_steps};
    const int64_t inner = by_panel ? all_steps : all_panels, parts = std::min(product->threads, outer.size());
    parallel(parts, [&](int64_t part) {
        const Range its = outer.part(part, parts);
        for (int64_t i = its.first; i < its.last; ++i)
            for (int64_t j = 0; j < inner; ++j) pack_step(*product, b, by_panel ? i : j, by_panel ? j : i);
    });
}

// c = a b. If `b` is not packed, it is while they are multiplied, which is better for a long inner dimension.
extern "C" __attribute__((visibility("default"))) void videomamba_matrix_product(const VideoMambaMatrixProduct* product) {
    product->packed ? multiply_packed(*product) : multiply_in_steps(*product);
}
