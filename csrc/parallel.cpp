#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace fdk {
namespace {

int processors() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

class Pool {
public:
    // Runs task(0), ..., task(count - 1), each once. False when the pool is taken: the caller then runs them itself.
    bool run(int count, const std::function<void(int)>& task) {
        std::unique_lock<std::mutex> taken(user_, std::try_to_lock);
        if (!taken.owns_lock()) return false;
        grow(count - 1);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            task_ = &task;
            count_ = count;
            next_ = 0;
            open_ = count;
            error_ = nullptr;
        }
        wake_.notify_all();
        work();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return open_ == 0; });
        task_ = nullptr;
        if (error_) std::rethrow_exception(error_);
        return true;
    }

private:
    void grow(int wanted) {
        while (workers_ < wanted) {
            try {
                // Detached: the pool is never destroyed, and a joinable thread would end the process at exit.
                std::thread([this] { serve(); }).detach();
            } catch (const std::system_error&) {
                return;  // no more threads to be had: those that exist do the work
            }
            ++workers_;
        }
    }

    void serve() {
        for (;;) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [this] { return task_ != nullptr && next_ < count_; });
            }
            work();
        }
    }

    // Takes parts until none is left. The mutex is held only to take one: parts are large.
    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        while (task_ != nullptr && next_ < count_) {
            const int part = next_++;
            const std::function<void(int)>& task = *task_;
            lock.unlock();
            std::exception_ptr error;
            try {
                task(part);
            } catch (...) {
                error = std::current_exception();
            }
            lock.lock();
            if (error && !error_) error_ = error;
            if (--open_ == 0) done_.notify_all();
        }
    }

    std::mutex user_;   // held by the thread whose call the pool serves
    std::mutex mutex_;  // guards all below
    std::condition_variable wake_, done_;
    const std::function<void(int)>* task_ = nullptr;
    int count_ = 0, next_ = 0, open_ = 0, workers_ = 0;
    std::exception_ptr error_;
};

std::atomic<Pool*> current{nullptr};

#if defined(__unix__) || defined(__APPLE__)
// The child of fork() has none of the workers and locks in an unknown state: it forgets the pool (some hundred bytes).
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
#endif

Pool& pool() {
    Pool* found = current.load();
    if (found != nullptr) return *found;
    Pool* made = new Pool;  // never destroyed: workers may outlive main()
    if (current.compare_exchange_strong(found, made)) return *made;
    delete made;  // another thread was faster
    return *found;
}

thread_local bool inside = false;  // this thread is running a part: nested calls stay on it

void run(int count, const std::function<void(int)>& task) {
    const std::function<void(int)> marked = [&task](int part) {
        struct Mark {
            bool before = inside;
            Mark() { inside = true; }
            ~Mark() { inside = before; }
        } mark;
        task(part);
    };
    if (count > 1 && !inside && pool().run(count, marked)) return;
    for (int part = 0; part < count; ++part) marked(part);
}

constexpr int kMostThreads = 1024;  // more would only use up what the system has

int parts(int64_t n, int threads) {
    return static_cast<int>(std::min<int64_t>(n, threads > 0 ? std::min(threads, kMostThreads) : processors()));
}

}  // namespace

void parallel_for(int64_t n, int threads, const std::function<void(int64_t, int64_t)>& f) {
    if (n <= 0) return;
    const int count = parts(n, threads);
    const int64_t share = n / count, rest = n % count;  // the first `rest` parts get one more
    run(count, [&](int part) {
        const int64_t begin = part * share + std::min<int64_t>(part, rest);
        f(begin, begin + share + (part < rest ? 1 : 0));
    });
}

void parallel_for_dynamic(int64_t n, int threads, const std::function<void(int64_t)>& f) {
    if (n <= 0) return;
    std::atomic<int64_t> next{0};
    run(parts(n, threads), [&](int) {
        for (int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) f(i);
    });
}

}  // namespace fdk
