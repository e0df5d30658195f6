/* Outputs held to grammars as a worker does it: shared, moved on, rebuilt, given back. */
#include "common/grammar/constraint.h"

#include "check.h"

static struct constraints *all;

static const char number[] = "{\"schema\":{\"type\":\"integer\",\"minimum\":10,\"maximum\":99}}";
static const char list[] = "{\"schema\":{\"type\":\"array\",\"items\":{\"enum\":[1,2]}}}";

/* The first id that may come next. */
static int32_t first_allowed(struct constraint *c)
{
    const uint32_t *mask;
    CHECK_OK(constraint_mask(c, constraint_state(c), &mask));
    for (int32_t id = 0; id < 3000; id++)
        if (mask[id / 32] >> id % 32 & 1)
            return id;
    return -1;
}

static struct constraint *hold(const char *text, const int32_t *ids, size_t n)
{
    struct constraint *c = NULL;
    CHECK_OK(constraint_create(all, text, strlen(text), ids, n, &c));
    REQUIRE(c);
    return c;
}

static void equal_texts_share_masks(void)
{
    struct constraint *a = hold(number, NULL, 0), *b = hold(number, NULL, 0),
                      *c = hold(list, NULL, 0);
    const uint32_t *x, *y, *z;
    CHECK_OK(constraint_mask(a, constraint_state(a), &x));
    CHECK_OK(constraint_mask(b, constraint_state(b), &y));
    CHECK_OK(constraint_mask(c, constraint_state(c), &z));
    CHECK(x == y && x != z);
    constraint_destroy(a);
    constraint_destroy(b);
    constraint_destroy(c);
    constraints_trim(all);
    a = hold(number, NULL, 0); /* kept without a user */
    CHECK_OK(constraint_mask(a, constraint_state(a), &y));
    CHECK(x == y);
    constraint_destroy(a);
}

static void output_is_followed_and_found_again(void)
{
    int32_t ids[64];
    size_t n = 0;
    struct constraint *a = hold(list, NULL, 0);
    while (n < 20) {
        ids[n] = first_allowed(a);
        CHECK(ids[n] >= 0);
        CHECK_OK(constraint_advance(a, ids[n++]));
    }
    struct constraint *b = hold(list, ids, n);
    CHECK_INT(constraint_state(a).at, constraint_state(b).at);
    const uint32_t *mask;
    CHECK_OK(constraint_mask(a, constraint_state(a), &mask));
    int32_t wrong = 0;
    while (mask[wrong / 32] >> wrong % 32 & 1)
        wrong++;
    uint32_t before = constraint_state(a).at;
    CHECK_INT(constraint_advance(a, wrong), ERR_INTERNAL);
    CHECK_INT(constraint_state(a).at, before);
    ids[n++] = wrong;
    struct constraint *none = NULL;
    CHECK_INT(constraint_create(all, list, strlen(list), ids, n, &none), ERR_INVALID);
    CHECK(!none && strstr(err_text(ERR_INVALID), "does not fit the grammar"));
    constraint_destroy(a);
    constraint_destroy(b);
}

static void many_grammars_are_forgotten(void)
{
    struct constraint *kept = hold(number, NULL, 0);
    const uint32_t *before, *after;
    CHECK_OK(constraint_mask(kept, constraint_state(kept), &before));
    for (int i = 0; i < 300; i++) {
        char text[80];
        snprintf(text, sizeof(text), "{\"schema\":{\"const\":%d}}", i);
        constraint_destroy(hold(text, NULL, 0));
        constraints_trim(all);
    }
    CHECK_OK(constraint_mask(kept, constraint_state(kept), &after));
    CHECK(before == after); /* what has a user stays */
    constraint_destroy(kept);
}

static void bad_grammars(void)
{
    struct constraint *c = NULL;
    CHECK_INT(constraint_create(all, "{", 1, NULL, 0, &c), ERR_INVALID);
    static const char not [] = "{\"schema\":{\"not\":{}}}";
    CHECK_INT(constraint_create(all, not, strlen(not ), NULL, 0, &c), ERR_INVALID);
    CHECK_STR(err_text(ERR_INVALID), "\"not\" is not supported");
    struct constraints *bare = NULL;
    CHECK_OK(constraints_create("/nonexistent", 10, NULL, 0, &bare));
    CHECK_INT(constraint_create(bare, number, strlen(number), NULL, 0, &c), ERR_INVALID);
    CHECK(strstr(err_text(ERR_INVALID), "no tokenizer.json"));
    constraints_destroy(bare);
}

int main(void)
{
    static const int32_t eos[] = {3000, 3007, 3009};
    CHECK_OK(constraints_create(getenv("BATON_DEMO_DIR"), 3072, eos, 3, &all));
    REQUIRE(all);
    RUN(equal_texts_share_masks);
    RUN(output_is_followed_and_found_again);
    RUN(many_grammars_are_forgotten);
    RUN(bad_grammars);
    constraints_destroy(all);
    return check_done();
}
