// Threads: those of PyTorch.
#pragma once

#include <dlfcn.h>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace videomamba {

// Numbers below the smallest normal one are zero while this exists. States and gradients decay to such numbers and stay
// there, and a processor takes many times as long for them.
class FlushDenormals {
  public:
    FlushDenormals() : before_(control()) { set_control(before_ | kFlush); }
    ~FlushDenormals() { set_control(before_); }
    FlushDenormals(const FlushDenormals&) = delete;

  private:
#if defined(__SSE__)
    using Control = unsigned;
    static constexpr Control kFlush = 0x8040;  // of results and of operands
    static Control control() { return _mm_getcsr(); }
    static void set_control(Control value) { _mm_setcsr(value); }
#elif defined(__aarch64__)
    using Control = uint64_t;
    static constexpr Control kFlush = 1 << 24;
    static Control control() {
        Control value;
        asm volatile("mrs %0, fpcr" : "=r"(value));
        return value;
    }
    static void set_control(Control value) { asm volatile("msr fpcr, %0" : : "r"(value)); }
#else
    using Control = int;
    static constexpr Control kFlush = 0;
    static Control control() { return 0; }
    static void set_control(Control) {}
#endif
    const Control before_;
};

// Calls `function(part)` for each of `parts` parts, on as many threads. PyTorch has loaded an OpenMP runtime already, and
// its matrix products keep the threads of that runtime spinning for a while: a second runtime, which linking with OpenMP
// can bring along, would compete with them for the cores. So the entry point is taken from the one that is there.
template <class Function>
void parallel(int64_t parts, const Function& function) {
    struct Work {
        const Function& function;
        const int64_t parts;
        std::atomic<int64_t> next{0};
        static void run(void* work) {
            auto& self = *static_cast<Work*>(work);
            const FlushDenormals flush;
            for (int64_t part; (part = self.next++) < self.parts;) self.function(part);
        }
    } work{function, parts};
    if (parts == 1) return Work::run(&work);

    using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);
    static const auto region = reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (region != nullptr) return region(&Work::run, &work, static_cast<unsigned>(parts), 0);
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < parts; ++i) threads.emplace_back(&Work::run, &work);
    Work::run(&work);
    for (auto& thread : threads) thread.join();
}

}  // namespace videomamba
