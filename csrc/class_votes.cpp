// Where the true class stands among the votes of the nearest neighbours, for several numbers of neighbours at once.

#include <vector>

#include "check.h"
#include "parallel.h"

// classes [rows][k], in 0 ... number - 1, and weights [rows][k] of the neighbours, best first; truth [rows], negative for a
// class without neighbours; ks [n], ascending, at most k. ranks [rows][n]: how many classes have more votes than the true
// one, or as many and a lower number; -1 if nobody voted for it. Votes are added up in the order of the neighbours.
extern "C" int fdk_class_votes(int64_t rows, int64_t k, const int64_t* classes, const double* weights, const int64_t* truth,
                               int64_t number, const int64_t* ks, int64_t n, int64_t* ranks, int num_threads) {
    if (!fdk::fits({rows, k}) || !fdk::fits({number}) || !fdk::fits({rows, n}) ||
        !fdk::given(rows * k > 0, classes, weights) || !fdk::given(rows > 0, truth) || !fdk::given(n > 0, ks) ||
        !fdk::given(rows * n > 0, ranks))
        return 1;
    for (int64_t i = 0; i < n; ++i)
        if (ks[i] < (i > 0 ? ks[i - 1] : 0) || ks[i] > k) return 1;
    return fdk::guarded([&] {
        fdk::parallel_for(rows, num_threads, [&](int64_t begin, int64_t end) {
            std::vector<double> votes(number, 0.0);
            std::vector<char> seen(number, 0);
            std::vector<int64_t> voted;
            for (int64_t r = begin; r < end; ++r) {
                voted.clear();
                int64_t done = 0;
                for (int64_t i = 0; i < n; ++i) {
                    for (; done < ks[i]; ++done) {
                        const int64_t c = classes[r * k + done];
                        if (c < 0 || c >= number) throw fdk::BadArgument();
                        if (!seen[c]) voted.push_back(c);
                        seen[c] = 1;
                        votes[c] += weights[r * k + done];
                    }
                    const int64_t own = truth[r];
                    if (own >= number) throw fdk::BadArgument();
                    int64_t rank = own < 0 || votes[own] <= 0 ? -1 : 0;
                    if (rank == 0)
                        for (const int64_t c : voted) rank += votes[c] > votes[own] || (votes[c] == votes[own] && c < own);
                    ranks[r * n + i] = rank;
                }
                for (const int64_t c : voted) votes[c] = 0, seen[c] = 0;
            }
        });
    });
}
