// Threads: those of PyTorch.
#pragma once

#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace videomamba {

// Calls `function(part)` for each of `parts` parts, on as many threads. PyTorch has loaded an OpenMP runtime already, and
// its matrix products keep the threads of that runtime spinning for a while: a second runtime, which linking with OpenMP
// can bring along, would compete with them for the cores. So the entry point is taken from the one that is there.
template <class Function>
void parallel(int64_t parts, const Function& function) {
    if (parts == 1) return function(0);
    struct Work {
        const Function& function;
        const int64_t parts;
        std::atomic<int64_t> next{0};
        static void run(void* work) {
            auto& self = *static_cast<Work*>(work);
            for (int64_t part; (part = self.next++) < self.parts;) self.function(part);
        }
    } work{function, parts};

    using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);
    static const auto region = reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (region != nullptr) return region(&Work::run, &work, static_cast<unsigned>(parts), 0);
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < parts; ++i) threads.emplace_back(&Work::run, &work);
    Work::run(&work);
    for (auto& thread : threads) thread.join();
}

}  // namespace videomamba
