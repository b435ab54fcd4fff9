// One pool of threads for every kernel of the library.
//
// parallel_for(n, threads, f)          f(begin, end) on equal contiguous parts of [0, n), as many as threads
// parallel_for_dynamic(n, threads, f)  f(i) for every i of [0, n), each taken by the next free thread
//
// The calling thread works too. Why not OpenMP: torch ships its own libgomp, and two pools that spin for work slow each
// other down. Workers sleep on a condition variable between calls. While one Python thread uses the pool, a call from
// another thread (or from inside f) runs on its own thread alone, so calls never wait for each other. After fork() the
// child starts new workers. An exception thrown by f is rethrown in the caller.
#pragma once

#include <cstdint>
#include <functional>

namespace fdk {

// threads <= 0 means all processors this process may run on.
void parallel_for(int64_t n, int threads, const std::function<void(int64_t begin, int64_t end)>& f);
void parallel_for_dynamic(int64_t n, int threads, const std::function<void(int64_t i)>& f);

}  // namespace fdk
