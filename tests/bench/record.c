/* record.c: see record.h. */
#include "tests/bench/record.h"

#include <math.h>
#include <stdlib.h>

#include "common/base/own.h"

const char *outcome_text(enum outcome o)
{
    static const char *const texts[] = {
#define X(name, text) text,
        OUTCOME_TABLE(X)
#undef X
    };
    return texts[o];
}

void record_finish(struct record *r)
{
    free(r->event_us);
    r->event_us = NULL;
}

enum err record_add_event(struct record *r, uint64_t now_us)
{
    if (r->n_events == r->cap_events) {
        uint32_t cap = r->cap_events ? 2 * r->cap_events : MIN(r->wanted_tokens + 1, 4096u);
        uint32_t *more = reallocarray(r->event_us, cap, sizeof(*more));
        if (!more)
            return err_set(ERR_NOMEM, "no memory for the events");
        r->event_us = more;
        r->cap_events = cap;
    }
    r->event_us[r->n_events++] = (uint32_t)(now_us - r->sent_us);
    return ERR_OK;
}

double record_ttft_ms(const struct record *r) { return r->event_us[0] / 1e3; }

double record_e2el_ms(const struct record *r) { return (double)(r->end_us - r->sent_us) / 1e3; }

double record_tpot_ms(const struct record *r)
{
    return r->output_tokens < 2
               ? NAN
               : (record_e2el_ms(r) - record_ttft_ms(r)) / (double)(r->output_tokens - 1);
}
