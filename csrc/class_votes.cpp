// Where the true class stands among the votes of the nearest neighbours, for several numbers of neighbours at once.

#include <new>
#include <vector>

#include "parallel.h"

// classes [rows][k], in 0 ... number - 1, and weights [rows][k] of the neighbours, best first; truth [rows], negative for a
// class without neighbours; ks [n], ascending, at most k. ranks [rows][n]: how many classes have more votes than the true
// one, or as many and a lower number; -1 if nobody voted for it. Votes are added up in the order of the neighbours.
extern "C" int fdk_class_votes(int64_t rows, int64_t k, const int64_t* classes, const double* weights, const int64_t* truth,
                               int64_t number, const int64_t* ks, int64_t n, int64_t* ranks, int num_threads) {
    try {
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
                        if (!seen[c]) voted.push_back(c);
                        seen[c] = 1;
                        votes[c] += weights[r * k + done];
                    }
                    const int64_t own = truth[r];
                    int64_t rank = own < 0 || votes[own] <= 0 ? -1 : 0;
                    if (rank == 0)
                        for (const int64_t c : voted) rank += votes[c] > votes[own] || (votes[c] == votes[own] && c < own);
                    ranks[r * n + i] = rank;
                }
                for (const int64_t c : voted) votes[c] = 0, seen[c] = 0;
            }
        });
    } catch (const std::bad_alloc&) {
        return 2;
    }
    return 0;
}
