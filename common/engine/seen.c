/* seen.c: see seen.h. */
#include "common/engine/seen.h"

#include <stdlib.h>

enum err seen_init(struct seen *s, int vocab)
{
    *s = (struct seen){.list = calloc((size_t)vocab, sizeof(*s->list)),
                       .place = calloc((size_t)vocab, sizeof(*s->place))};
    if (s->list && s->place)
        return ERR_OK;
    seen_finish(s);
    return err_set(ERR_NOMEM, "no memory for the penalties' counts of %d ids", vocab);
}

void seen_finish(struct seen *s)
{
    free(s->list);
    free(s->place);
    *s = (struct seen){0};
}

static struct sample_seen *entry(struct seen *s, int32_t id)
{
    if (s->place[id] == 0) {
        s->list[s->n] = (struct sample_seen){.id = id};
        s->place[id] = ++s->n;
    }
    return &s->list[s->place[id] - 1];
}

void seen_prompt(struct seen *s, int32_t id) { entry(s, id); }

void seen_output(struct seen *s, int32_t id) { entry(s, id)->count++; }

void seen_clear(struct seen *s)
{
    while (s->n > 0)
        s->place[s->list[--s->n].id] = 0;
}
