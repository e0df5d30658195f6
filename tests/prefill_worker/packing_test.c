/* packing_test.c: the rule of packing.h, by example and over random queues. */
#include "prefill_worker/packing.h"

#include "check.h"

#define MAX 64

static void packs_in_order_when_the_oldest_fits(void)
{
    uint32_t left[] = {30, 50, 40}, got[3];
    CHECK_INT(packing_choose(left, 3, 100, MAX, got), 100);
    CHECK_INT(got[0], 30);
    CHECK_INT(got[1], 50);
    CHECK_INT(got[2], 20);
}

static void short_prompts_pass_a_long_one(void)
{
    uint32_t left[] = {1000, 20, 200, 30}, got[4];
    CHECK_INT(packing_choose(left, 4, 100, MAX, got), 100);
    CHECK_INT(got[1], 20); // both fit into half a chunk
    CHECK_INT(got[3], 30);
    CHECK_INT(got[0], 50); // the oldest takes the rest
    CHECK_INT(got[2], 0);
}

static void respects_the_number_of_prompts(void)
{
    uint32_t left[] = {1000, 1, 1, 1}, got[4];
    CHECK_INT(packing_choose(left, 4, 100, 2, got), 100);
    CHECK_INT(got[0], 99);
    CHECK_INT(got[1], 1);
    CHECK_INT(got[2] + got[3], 0);
    CHECK_INT(packing_choose(left, 4, 100, 0, got), 0);
    CHECK_INT(packing_choose(left, 0, 100, MAX, got), 0);
}

/* Random arrivals: every chunk is full while there is work, the oldest always gets at least half of
 * one, and everything ends. */
static void nobody_starves(void)
{
    for (unsigned seed = 1; seed <= 200; seed++) {
        srand(seed);
        uint32_t left[MAX], n = 0, chunk = 16 + (uint32_t)rand() % 200, to_come = 300, rounds = 0;
        while (n > 0 || to_come > 0) {
            while (n < MAX && to_come > 0 && rand() % 3) {
                left[n++] = 1 + (uint32_t)(rand() % 10 ? rand() % 50 : rand() % 5000);
                to_come--;
            }
            uint32_t got[MAX], total = 0, want = 0;
            uint32_t sum = packing_choose(left, n, chunk, MAX, got);
            for (uint32_t i = 0; i < n; i++) {
                total += got[i];
                want += left[i];
                if (got[i] > left[i])
                    CHECK(!"took more than there is");
            }
            if (sum != total || sum != (want < chunk ? want : chunk))
                CHECK(!"the chunk is not full");
            if (n > 0 && got[0] < left[0] && got[0] * 2 < chunk)
                CHECK(!"the oldest got less than half");
            uint32_t kept = 0;
            for (uint32_t i = 0; i < n; i++)
                if (left[i] > got[i])
                    left[kept++] = left[i] - got[i];
            n = kept;
            if (++rounds > 1000000)
                REQUIRE(!"does not end");
        }
        if (check_failures) {
            fprintf(stderr, "seed %u\n", seed);
            return;
        }
    }
    CHECK(true);
}

int main(void)
{
    RUN(packs_in_order_when_the_oldest_fits);
    RUN(short_prompts_pass_a_long_one);
    RUN(respects_the_number_of_prompts);
    RUN(nobody_starves);
    return check_done();
}
