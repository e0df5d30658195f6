/* seen_test.c: the list against counts kept the plain way. */
#include "common/engine/seen.h"

#include "check.h"

enum { VOCAB = 50 };

static void lists_hold_each_id_once(void)
{
    struct seen s;
    CHECK_OK(seen_init(&s, VOCAB));
    for (int round = 0; round < 3; round++) { // cleared, it starts anew
        int count[VOCAB], distinct = 0;
        for (int id = 0; id < VOCAB; id++)
            count[id] = -1;
        for (int i = 0; i < 40 * round; i++) {
            int id = (i * i * 7 + round) % VOCAB;
            bool prompt = i < 10;
            distinct += count[id] < 0;
            count[id] = (count[id] < 0 ? 0 : count[id]) + !prompt;
            (prompt ? seen_prompt : seen_output)(&s, id);
        }
        CHECK_INT(s.n, distinct);
        for (int i = 0; i < s.n; i++) {
            CHECK_INT(s.list[i].count, count[s.list[i].id]);
            count[s.list[i].id] = -2; // not again
        }
        seen_clear(&s);
        CHECK_INT(s.n, 0);
    }
    for (int id = 0; id < VOCAB; id++) // there is room for all
        seen_output(&s, VOCAB - 1 - id);
    CHECK_INT(s.n, VOCAB);
    seen_finish(&s);
    CHECK(!s.list);
    seen_finish(&s);
}

int main(void)
{
    RUN(lists_hold_each_id_once);
    return check_done();
}
