/* accept_test.c: drafts decide how many draws count, never what they are. */
#include "decode_worker/accept.h"

#include "check.h"

static const struct model_config model = {.eos = {90, 91}, .n_eos = 2};

static struct wire_sampling plain(void)
{
    return (struct wire_sampling){.max_tokens = 100, .repetition_penalty = 1, .top_p = 1};
}

static void accepts_the_matching_prefix(void)
{
    struct wire_sampling s = plain();
    enum wire_finish finish;
    int32_t sampled[] = {1, 2, 3, 4}, right[] = {1, 2, 3}, wrong[] = {1, 9, 3}, never[] = {7, 2, 3};
    CHECK_INT(accept_window(&s, &model, 0, sampled, right, 3, &finish), 4);
    CHECK_INT(accept_window(&s, &model, 0, sampled, wrong, 3, &finish), 2);
    CHECK_INT(accept_window(&s, &model, 0, sampled, never, 3, &finish), 1);
    CHECK_INT(accept_window(&s, &model, 0, sampled, NULL, 0, &finish), 1);
    CHECK_INT(finish, WIRE_RUNNING);
}

static void stops_inside_a_window(void)
{
    struct wire_sampling s = plain();
    enum wire_finish finish;
    int32_t sampled[] = {1, 91, 3, 4}, draft[] = {1, 91, 3};
    CHECK_INT(accept_window(&s, &model, 0, sampled, draft, 3, &finish), 2);
    CHECK_INT(finish, WIRE_STOP);
    s.ignore_eos = 1;
    CHECK_INT(accept_window(&s, &model, 0, sampled, draft, 3, &finish), 4);
    CHECK_INT(finish, WIRE_RUNNING);
    s.n_stop_ids = 1;
    s.stop_ids[0] = 3;
    CHECK_INT(accept_window(&s, &model, 0, sampled, draft, 3, &finish), 3);
    CHECK_INT(finish, WIRE_STOP);
    s = plain();
    s.max_tokens = 11;
    int32_t quiet[] = {1, 2, 3, 4}, quiet_draft[] = {1, 2, 3};
    CHECK_INT(accept_window(&s, &model, 9, quiet, quiet_draft, 3, &finish), 2);
    CHECK_INT(finish, WIRE_LENGTH);
}

/* The text with any drafts is the text without: a target that is a function of the position is
 * decoded with random drafts of random quality. */
static void text_does_not_depend_on_drafts(void)
{
    for (unsigned seed = 1; seed <= 500; seed++) {
        srand(seed);
        int32_t target[200];
        for (int i = 0; i < 200; i++)
            target[i] = rand() % 60 ? rand() % 80 : 90; // an eos now and then
        struct wire_sampling s = plain();
        s.max_tokens = 1 + (uint32_t)rand() % 150;
        uint32_t want = 0;
        while (want < s.max_tokens && target[want] != 90)
            want++;
        if (want < s.max_tokens)
            want++; // the eos is output too

        uint32_t n = 0;
        enum wire_finish finish = WIRE_RUNNING;
        while (finish == WIRE_RUNNING) {
            uint32_t k = (uint32_t)rand() % 8;
            int32_t draft[7];
            for (uint32_t j = 0; j < k; j++)
                draft[j] = rand() % 4 ? target[n + j] : rand() % 80;
            n += accept_window(&s, &model, n, target + n, draft, k, &finish);
        }
        if (n != want) {
            CHECK_INT(n, want);
            fprintf(stderr, "seed %u\n", seed);
            return;
        }
    }
    CHECK(true);
}

int main(void)
{
    RUN(accepts_the_matching_prefix);
    RUN(stops_inside_a_window);
    RUN(text_does_not_depend_on_drafts);
    return check_done();
}
